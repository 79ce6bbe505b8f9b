// What llama.cpp reports while it loads, two thousand lines and calls.
#include <stdio.h>

#include <deque>
#include <mutex>
#include <string>

#include "abi.h"

namespace {

enum { kDebug = 1, kContinued = 5 };  // ggml_log_level
constexpr size_t kLines = 600, kLength = 4096;

struct Line {
  int32_t level;
  std::string text;
};

// Never destroyed: llama.cpp's own threads may still log when the process ends.
struct Log {
  std::mutex busy;
  std::deque<Line> lines;
  bool dropping = false;  // whether the line that is being continued was a debug line
};

Log &the_log() {
  static Log *log = new Log;
  return *log;
}

}  // namespace

extern "C" void mse_log_line(int32_t level, const char *text, void *) {
  try {
    Log &log = the_log();
    std::lock_guard<std::mutex> lock(log.busy);
    if (level != kContinued) log.dropping = level == kDebug;
    if (log.dropping) return;
    log.lines.push_back({level, std::string(text).substr(0, kLength)});
    if (log.lines.size() > kLines) log.lines.pop_front();
  } catch (...) {  // no memory: losing a line is harmless
  }
}

extern "C" bool mse_log_take(int32_t *level, char *text, int64_t room) {
  try {
    Log &log = the_log();
    std::lock_guard<std::mutex> lock(log.busy);
    if (log.lines.empty() || room < 1) return false;
    *level = log.lines.front().level;
    snprintf(text, static_cast<size_t>(room), "%s", log.lines.front().text.c_str());
    log.lines.pop_front();
    return true;
  } catch (...) {
    return false;
  }
}

extern "C" bool mse_progress_step(float fraction, void *user) {
  auto *progress = static_cast<mse_progress *>(user);
  if (fraction < 1 && fraction - progress->last < progress->step) return true;  // go on
  progress->last = fraction;
  return progress->report(fraction, nullptr);
}
