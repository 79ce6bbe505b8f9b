// The C ABI of the CPU library: plain C types only, so that ctypes (or any language) can load it.
//
// Every function that can fail returns 0 for success or one of the codes below. Nothing here throws,
// prints or changes the process's environment; a handle may be used from several threads (calls on
// one handle run one after the other).
#ifndef MSE_ABI_H
#define MSE_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define MSE_API __declspec(dllexport)
#else
#define MSE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MSE_ABI_VERSION 2

enum mse_status {
  MSE_OK = 0,
  MSE_BAD_DIMS = 1,      // a dimension outside the limits below
  MSE_BAD_ISA = 2,       // unknown instruction set, or one this processor lacks
  MSE_BAD_STORAGE = 3,   // unknown storage
  MSE_NO_MEMORY = 4,
  MSE_BAD_LENGTH = 5,    // a length < 0 or > its T; where[] says which
  MSE_NOT_FINITE = 6,    // a NaN or an infinity in a frame that counts; where[] says which
  MSE_BAD_ARGUMENT = 7,  // a null pointer or a negative size
};

enum mse_storage { MSE_F32 = 0, MSE_F16 = 1, MSE_BF16 = 2 };

#define MSE_MAX_HIDDEN 512
#define MSE_MAX_DIM 65536
#define MSE_MAX_PSEUDO 64
#define MSE_MAX_THREADS 64

typedef struct mse_dims {
  int32_t audio_dim, audio_hidden;
  int32_t video_dim, video_hidden;
  int32_t mix;       // width of the encoders' output (256 in the published model)
  int32_t width;     // D, the backbone's embedding width
  int32_t scale[3];  // hidden widths of the three experts, in the published order
  int32_t n_pseudo;
} mse_dims;

// Parameters in the published layout (row-major [out, in], f32, gates i, f, g, o). They are read
// during mse_open only.
typedef struct mse_weights {
  const float *audio_ih, *audio_hh, *audio_bih, *audio_bhh, *audio_lin, *audio_lin_b;
  const float *video_ih, *video_hh, *video_bih, *video_bhh, *video_lin, *video_lin_b;
  const float *text, *text_b;
  const float *first[3], *first_b[3], *second[3], *second_b[3];
  const float *mix, *mix_b;  // [3], [1]
  const float *up, *up_b;    // multi_scale_projector
  const float *pseudo, *pseudo_b;
} mse_weights;

typedef struct mse_inputs {
  int64_t batch;
  const float *audio, *video, *text;  // [B, T, dim], C order
  const int64_t *audio_len, *video_len, *text_len;
  int64_t audio_steps, video_steps, text_steps;  // T of each
} mse_inputs;

typedef struct mse_handle mse_handle;

MSE_API int32_t mse_abi_version(void);

// Names of the instruction sets in this binary, best first, comma separated.
MSE_API const char *mse_isas(void);
// 1 if this processor runs that instruction set.
MSE_API int32_t mse_isa_usable(const char *isa);

// isa "" picks the best one. threads counts the calling one.
MSE_API int32_t mse_open(const mse_dims *dims, const mse_weights *weights, int32_t threads,
                         int32_t storage, const char *isa, mse_handle **out);
MSE_API const char *mse_isa(const mse_handle *handle);
// Bytes of packed weights and of scratch memory this handle holds.
MSE_API void mse_memory(const mse_handle *handle, int64_t *weights, int64_t *scratch);
// out [B, P, D]. On an error where = {input 0 audio 1 video 2 text, sample, step, column}.
MSE_API int32_t mse_forward(mse_handle *handle, const mse_inputs *in, float *out, int64_t where[4]);
MSE_API void mse_close(mse_handle *handle);

// Single kernels, for the error budgets of the tests and the floors of the benchmark.
// what: 0 sigmoid, 1 tanh, 2 gelu.
MSE_API int32_t mse_activate(const char *isa, int32_t what, const float *x, float *y, int64_t n);
// y [M, N] = x [M, K] w[N, K]^T + b.
MSE_API int32_t mse_linear(const char *isa, int32_t storage, const float *w, const float *b,
                           int32_t N, int32_t K, const float *x, int32_t M, float *y);
// out [D] = mean of the n rows of [n, D].
MSE_API int32_t mse_mean_rows(const char *isa, const float *rows, int64_t n, int32_t D, float *out);
// Runs `rounds` rounds of independent fused multiply-adds in registers; returns how many
// multiply-accumulates that was.
MSE_API int64_t mse_probe_mac(const char *isa, int64_t rounds);
// Reads n floats once; the sum only keeps the compiler honest.
MSE_API float mse_probe_read(const char *isa, const float *x, int64_t n);

// Cuts llama.cpp's graph short: while `armed`, the tensor called `wanted` is copied to `rows` and
// nothing after it is computed. The three functions are ggml's own (ggml_get_name, ggml_nbytes,
// ggml_backend_tensor_get), so that this library needs neither its headers nor its binary.
typedef struct mse_tap {
  const char *(*name)(const void *tensor);
  size_t (*size)(const void *tensor);
  void (*read)(const void *tensor, void *to, size_t offset, size_t size);
  const char *wanted;
  void *rows;
  int64_t capacity;  // bytes of rows
  int64_t taken;     // bytes copied; a tensor that does not fit is left alone and so is this
  int32_t armed;
} mse_tap;

// A ggml_backend_sched_eval_callback; `tap` is a mse_tap.
MSE_API bool mse_tap_node(const void *tensor, bool ask, void *tap);

// A ggml_abort_callback: whether the int32 at `flag` is not zero. Another thread may set it.
MSE_API bool mse_stop_asked(void *flag);

// What llama.cpp reports, without entering Python each time: that means waiting until no other thread
// runs it.

// A ggml_log_callback that keeps the line, but for debug lines; there is one log in a process.
MSE_API void mse_log_line(int32_t level, const char *text, void *user);
// The oldest kept line into text [room], cut to fit and ended with a zero; false where there is none.
MSE_API bool mse_log_take(int32_t *level, char *text, int64_t room);

// A llama_progress_callback that calls another at the beginning, each `step`, and at the end.
typedef struct mse_progress {
  bool (*report)(float fraction, void *user);  // user is null
  float step, last;  // last: fraction of the last report; at first below -step
} mse_progress;
MSE_API bool mse_progress_step(float fraction, void *progress);

// Where `count` strings end that begin at data[at], each its length in eight bytes (little-endian)
// and as many bytes; -1 where they would not within `size`.
MSE_API int64_t mse_skip_strings(const uint8_t *data, int64_t at, int64_t size, int64_t count);
// Which of them occur in `text`, or have `always` [count] set (null: none). With `pairs` each is two
// strings with a space between, which must occur one after the other. To found [room][3]: number, where
// it begins, length. Returns how many there are; -1 as above, -2 where there is not the room.
MSE_API int64_t mse_find_strings(const uint8_t *data, int64_t at, int64_t size, int64_t count,
                                 const uint8_t *text, int64_t text_length, const uint8_t *always,
                                 int32_t pairs, int64_t *found, int64_t room);

#ifdef __cplusplus
}
#endif
#endif
