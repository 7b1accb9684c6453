// Chooses among the variants: by score, or by name through MICROVLM_KERNELS.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "operators.h"

namespace microvlm {
namespace {

const Kernels* const kBuilt[] = {
#if defined(__x86_64__)
    &kAvx512Vnni,
    &kAvx2,
#elif defined(__aarch64__)
    &kNeonDot,
    &kNeon,
#endif
    &kReference,
};
constexpr int64_t kBuiltCount = sizeof kBuilt / sizeof kBuilt[0];

struct Choice {
  const Kernels* runnable[kBuiltCount];
  int64_t count = 0;
  const Kernels* active = nullptr;
  char problem[256] = "";

  Choice() {
    for (const Kernels* kernels : kBuilt) {
      if (kernels->score() <= 0) continue;
      int64_t place = count++;
      for (; place > 0 && runnable[place - 1]->score() < kernels->score(); --place) {
        runnable[place] = runnable[place - 1];
      }
      runnable[place] = kernels;
    }
    active = runnable[0];
    const char* name = std::getenv("MICROVLM_KERNELS");
    if (name != nullptr && *name != '\0') choose(name);
  }

  void choose(const char* name) {
    active = nullptr;
    for (int64_t i = 0; i < count; ++i) {
      if (std::strcmp(runnable[i]->name, name) == 0) active = runnable[i];
    }
    if (active != nullptr) return;
    int written = std::snprintf(problem, sizeof problem,
                                "MICROVLM_KERNELS=%.60s is not a variant that runs here: choose one of ", name);
    for (int64_t i = 0; i < count && written < static_cast<int>(sizeof problem); ++i) {
      written +=
          std::snprintf(problem + written, sizeof problem - written, "%s%s", i == 0 ? "" : ", ", runnable[i]->name);
    }
  }
};

// Constructed while the library loads, before anyone can call it.
const Choice choice;

}  // namespace

int64_t variant_count() { return choice.count; }

const Kernels& variant(int64_t i) { return *choice.runnable[i]; }

const Kernels* find_variant(const char* name) {
  for (int64_t i = 0; i < variant_count(); ++i) {
    if (std::strcmp(variant(i).name, name) == 0) return &variant(i);
  }
  return nullptr;
}

const Kernels* active_variant(const char** problem) {
  *problem = choice.problem;
  return choice.active;
}

}  // namespace microvlm
