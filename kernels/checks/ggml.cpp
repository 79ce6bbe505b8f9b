// What llama.cpp calls (src/ggml_mapped.cpp, src/ggml_attention.cpp, src/ggml_opening.cpp, src/tap.cpp,
// src/reports.cpp), and the search of its vocabularies (src/strings.cpp), under the sanitizers: buffers of
// exactly the size that is needed, random shapes.
//
//   ggml ROUNDS SEED KERNEL...
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../src/abi.h"
#include "../src/ggml_tensor.h"

extern "C" bool llamafile_sgemm(const void *params, int64_t m, int64_t n, int64_t k, const void *A,
                                int64_t lda, const void *B, int64_t ldb, void *C, int64_t ldc,
                                int a_type, int b_type, int c_type);
extern "C" uint64_t mse_mapped_calls(void);
extern "C" int32_t mse_mapped_has(int32_t kernel);
extern "C" void mse_mapped_use(void *original, void *original_tiled, int32_t kernel, int32_t tensors);
extern "C" void ggml_compute_forward_flash_attn_ext(const void *params, mse_ggml::Tensor *result);
extern "C" void mse_attention_use(void *original, int32_t kernel);
extern "C" uint64_t mse_attention_calls(void);

extern "C" void mse_opening_use(const void *functions);
extern "C" void mse_opening_header(const void *wanted);
extern "C" void ggml_backend_buffer_clear(void *buffer, uint8_t value);
struct Params {
  bool no_alloc;
  void **tensors;
};
extern "C" void *gguf_init_from_file(const char *path, Params params);

static std::mt19937 random_bits;

static int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

// Of each type what a block of it and of its rows takes, and which the latter are. Values are compared
// in tests/test_kernels_mapped.py; here one share against three, and what lies beside the result.
static bool mapped(bool all) {
  static const int types[][4] = {{2, 18, 8, 34},    {6, 22, 8, 34},    {8, 34, 8, 34},
                                 {12, 144, 15, 292}, {13, 176, 15, 292}, {14, 210, 15, 292}};
  const int *type = types[all ? below(6) : 0];
  const int columns = 16 * (1 + below(5)), rows = 1 + below(90), blocks = 1 + below(5);
  const int stride = columns + below(5);
  std::vector<uint8_t> w(static_cast<size_t>(columns) * blocks * type[1]);
  std::vector<uint8_t> a(static_cast<size_t>(rows) * blocks * type[3]);
  for (auto *bytes : {&w, &a})
    for (auto &byte : *bytes) byte = static_cast<uint8_t>(random_bits()) & 0x3f;
  const float untouched = 12345.0f;
  std::vector<float> out[2];
  for (int threads : {1, 3}) {
    auto &to = out[threads > 1];
    to.assign(static_cast<size_t>(stride) * (rows - 1) + columns, untouched);
    for (int thread = 0; thread < threads; thread++) {
      const int params[] = {thread, threads};
      if (!llamafile_sgemm(params, columns, rows, blocks, w.data(), blocks, a.data(), blocks, to.data(),
                           stride, type[0], type[2], 0))
        return printf("type %d is not ours\n", type[0]), false;
    }
  }
  for (size_t i = 0; i < out[0].size(); i++)
    if (out[0][i] != out[1][i] || (out[0][i] == untouched) != (static_cast<int>(i % stride) >= columns))
      return printf("type %d: place %zu\n", type[0], i), false;
  return true;
}

// A tensor of `bytes` for each value and these sizes, in `data`.
static mse_ggml::Tensor tensor(int type, size_t bytes, int64_t a, int64_t b, int64_t c, std::vector<uint8_t> *data) {
  mse_ggml::Tensor made = {};
  made.type = type;
  const int64_t sizes[] = {a, b, c, 1};
  for (int i = 0; i < 4; i++) {
    made.size[i] = sizes[i];
    made.stride[i] = i ? made.stride[i - 1] * sizes[i - 1] : bytes;
  }
  data->resize(made.stride[3]);
  for (auto &byte : *data) byte = static_cast<uint8_t>(random_bits()) & 0x3f;
  made.data = data->data();
  return made;
}

// One share against three.
static bool attention() {
  const int group = 1 + below(3), of = 1 + below(3), depth = 32 * (1 + below(4));
  const int rows = 2 + below(70), keys = 8 * (1 + below(20));
  std::vector<uint8_t> data[5], before;
  mse_ggml::Tensor q = tensor(0, 4, depth, rows, group * of, data), k = tensor(1, 2, depth, keys, of, data + 1);
  mse_ggml::Tensor v = tensor(1, 2, depth, keys, of, data + 2), mask = tensor(1, 2, keys, rows, 1, data + 3);
  auto *hidden = reinterpret_cast<uint16_t *>(data[3].data());
  for (int i = 0; i < keys * rows; i++)
    if (below(3)) hidden[i] = 0xfc00;
  for (int threads : {1, 3}) {
    mse_ggml::Tensor result = tensor(0, 4, depth, group * of, rows, data + 4);
    mse_ggml::Tensor *sources[] = {&q, &k, &v, &mask};
    std::copy(sources, sources + 4, result.source);
    const float scale = 0.125f;
    memcpy(result.parameters, &scale, sizeof scale);
    const uint64_t count = mse_attention_calls();
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; thread++)
      running.emplace_back([&result, thread, threads] {
        const int params[] = {thread, threads};
        ggml_compute_forward_flash_attn_ext(params, &result);
      });
    for (auto &one : running) one.join();
    if (mse_attention_calls() != count + threads) return printf("attention is not ours\n"), false;
    if (threads > 1 && before != data[4]) return printf("attention of %d rows, %d keys\n", rows, keys), false;
    before = data[4];
  }
  return true;
}

struct Node {
  const char *name;
  std::vector<float> values;
};

static const char *name_of(const void *t) { return static_cast<const Node *>(t)->name; }
static size_t size_of(const void *t) { return static_cast<const Node *>(t)->values.size() * 4; }
static void read_of(const void *t, void *to, size_t offset, size_t size) {
  memcpy(to, reinterpret_cast<const char *>(static_cast<const Node *>(t)->values.data()) + offset, size);
}

static bool tap() {
  const Node wanted = {"last", std::vector<float>(1 + below(40), 7.0f)}, other = {"lasting", {1.0f}};
  std::vector<float> rows(1 + below(40));
  mse_tap t = {name_of, size_of, read_of, "last", rows.data(),
               static_cast<int64_t>(rows.size() * 4), 0, below(2)};
  if (mse_tap_node(&other, true, &t)) return printf("asked for another node\n"), false;
  if (mse_tap_node(&wanted, true, &t) != (t.armed != 0)) return printf("not asked for\n"), false;
  const bool fits = wanted.values.size() <= rows.size();
  if (mse_tap_node(&wanted, false, &t) == fits) return printf("did not end there\n"), false;
  return t.taken == (fits ? static_cast<int64_t>(wanted.values.size() * 4) : 0);
}

static bool reports() {
  const int n = 1 + below(700);
  std::string longest(below(9000), 'x');
  for (int i = 0; i < n; i++) mse_log_line(2, "line", nullptr);
  mse_log_line(1, "debug", nullptr);
  mse_log_line(5, "continued", nullptr);
  mse_log_line(4, longest.c_str(), nullptr);
  std::vector<char> text(1 + below(5000));
  int32_t level = 0;
  int found = 0;
  size_t length = 0;
  while (mse_log_take(&level, text.data(), static_cast<int64_t>(text.size()))) {
    found++;
    length = strlen(text.data());
  }
  const size_t whole = std::min({longest.size(), size_t{4096}, text.size() - 1});
  return found == std::min(n + 1, 600) && level == 4 && length == whole;
}

// Llama.cpp's functions, as src/ggml_opening.cpp calls them: a header is the bytes that were read, and a
// buffer a piece of memory.
static const size_t header_data = 4096;
static std::vector<uint8_t> read_header, memory;
static void *from_file(const char *, Params) { return nullptr; }
static void *from_callback(size_t (*read)(void *, void *, uint64_t, size_t), void *user, size_t, uint64_t,
                           Params) {
  read_header.clear();
  for (;;) {
    std::vector<uint8_t> piece(1 + below(900));
    piece.resize(read(user, piece.data(), read_header.size(), piece.size()));
    if (piece.empty()) return &read_header;
    read_header.insert(read_header.end(), piece.begin(), piece.end());
  }
}
static size_t data_offset(const void *) { return header_data; }
static void nothing(void *) {}
static void clear(void *, uint8_t value) { std::fill(memory.begin(), memory.end(), value); }
static const char *buffer_name(void *) { return below(4) ? "CPU" : "CUDA0"; }
static void *buffer_base(void *) { return memory.data(); }
static size_t buffer_size(void *) { return memory.size(); }

static bool opening() {
  const struct {
    void *(*from_file)(const char *, Params);
    decltype(&from_callback) callback;
    size_t (*offset)(const void *);
    void (*free)(void *), (*free_tensors)(void *);
    void (*clear)(void *, uint8_t);
    const char *(*name)(void *);
    void *(*base)(void *);
    size_t (*size)(void *);
  } functions = {from_file, from_callback, data_offset, nothing, nothing, clear, buffer_name, buffer_base, buffer_size};
  mse_opening_use(&functions);
  std::vector<uint8_t> head(below(1000), 'h'), tail(below(1000), 't');
  const size_t gap = below(1000), size = head.size() + gap + tail.size();
  const struct {
    const char *path;
    const void *head, *tail;
    uint64_t head_size, tail_size, size, data;
  } wanted = {"file", head.data(), tail.data(), head.size(), tail.size(), size, header_data};
  mse_opening_header(&wanted);
  const bool taken = gguf_init_from_file("file", {true, nullptr}) && !gguf_init_from_file("other", {true, nullptr});
  mse_opening_header(nullptr);
  if (!taken || gguf_init_from_file("file", {true, nullptr})) return printf("a header of another file\n"), false;
  head.insert(head.end(), gap, 0);
  head.insert(head.end(), tail.begin(), tail.end());
  if (head != read_header) return printf("a header of %zu bytes\n", size), false;
  memory.assign(1 + below(40000), 9);
  memory.shrink_to_fit();
  const auto value = static_cast<uint8_t>(below(2));
  ggml_backend_buffer_clear(nullptr, value);
  return std::all_of(memory.begin(), memory.end(), [=](uint8_t byte) { return byte == value; });
}

static bool strings() {
  std::vector<uint8_t> data, text(below(300)), always;
  const int count = below(60);
  for (auto &byte : text) byte = static_cast<uint8_t>('a' + below(3));
  for (int i = 0; i < count; i++) {
    const uint64_t length = below(8) ? below(6) : below(120);
    const auto *bytes = reinterpret_cast<const uint8_t *>(&length);
    data.insert(data.end(), bytes, bytes + sizeof length);
    for (uint64_t j = 0; j < length; j++) data.push_back(below(4) ? static_cast<uint8_t>('a' + below(3)) : ' ');
    always.push_back(below(2));
  }
  const auto size = static_cast<int64_t>(data.size()) - (below(3) ? 0 : below(20));
  if (size < 0) return true;
  data.resize(size);
  data.shrink_to_fit();
  std::vector<int64_t> found(3 * (1 + below(count + 1)));
  const auto room = static_cast<int64_t>(found.size() / 3);
  for (int pairs : {0, 1}) {
    const int64_t n = mse_find_strings(data.data(), 0, size, count, text.data(), text.size(),
                                       below(2) ? always.data() : nullptr, pairs, found.data(), room);
    if (n < -2 || n > room) return printf("strings: %d\n", static_cast<int>(n)), false;
  }
  return true;
}

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 100;
  random_bits.seed(argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 0);
  constexpr int kAmx = 4;  // which multiplies all types, the others Q4_0
  for (int k = 3; k < argc; k++) {
    const int kernel = atoi(argv[k]);
    if (!mse_mapped_has(kernel)) return printf("no kernel %d\n", kernel), 1;
    mse_mapped_use(nullptr, nullptr, kernel, 1);
    for (int i = 0; i < rounds; i++) {
      mse_attention_use(nullptr, kernel > 2 && i % 2 ? 2 : 1);  // AVX-512 where the products have it
      if (!mapped(kernel == kAmx) || !attention() || !tap() || !reports() || !strings() || !opening())
        return printf("kernel %d, round %d\n", kernel, i), 1;
    }
  }
  printf("%d products\n", static_cast<int>(mse_mapped_calls()));
  return 0;
}
