// Runs the glue under a host of our own (glue/test_host.h): every operator over right operands, over a seeded stream of
// hostile ones, with each call of the interface failing once, and on several threads. For the sanitizers, which see
// neither into ONNX Runtime's wheel nor to the end of a value in its arena. Exit status 1 at the first difference.
// Usage: test_glue [CASES [SEED]]; each variant that runs here gets that many hostile cases, in a process of its own.

#include <spawn.h>
#include <sys/wait.h>

#include <limits>

#include "glue/test_cases.h"
#include "glue/test_layers.h"

extern char** environ;

#if defined(__SANITIZE_ADDRESS__)
// An absurd size is an error of malloc's caller, which the glue has to live with.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
#elif defined(__SANITIZE_THREAD__)
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }
#endif

namespace {

using namespace host;

constexpr size_t kAllOps = kDeclarationCount + kLayerCount + 2;  // and the mask and the rotation
const OrtApiBase kBase = {get_api, nullptr};

std::vector<const OrtCustomOp*> registered_ops() {
  Options options;
  const std::string message = take(RegisterCustomOps(&options, &kBase));
  CHECK(message.empty(), "%s", message.c_str());
  CHECK(options.domains.size() == 1 && options.domains[0]->name == "ai.microvlm", "not one domain");
  CHECK(options.domains[0]->ops.size() == kAllOps, "not every operator");
  return options.domains[0]->ops;
}

struct Result {
  std::string message;
  std::vector<uint8_t> output;
};

Node node_of(Case* c) {
  Node node;
  for (size_t i = 0; i < c->op->input_count(); ++i) {
    node.inputs.push_back(c->is_missing[i] ? nullptr : &c->values[i]);
    node.are_constant.push_back(c->is_constant[i]);
  }
  node.attributes = c->attributes;
  return node;
}

Result run(const std::vector<const OrtCustomOp*>& ops, Case* c) {
  const OrtCustomOp* op = ops[c->op - kDeclarations];
  const Node node = node_of(c);
  void* kernel = nullptr;
  Result result;
  result.message = take(op->create_kernel(op, as_api(), &node, &kernel));
  if (!result.message.empty()) return result;
  Context context = {&node, c->threads, c->output_offset, {}, {}};
  result.message = take(op->compute(kernel, &context));
  op->destroy_kernel(kernel);
  const auto* output = static_cast<const uint8_t*>(context.output.data());
  if (output != nullptr) result.output.assign(output, output + context.output.content.size());
  return result;
}

void check_result(const Case& c, const Result& result) {
  CHECK(result.message.empty(), "%s: %s", c.describe().c_str(), result.message.c_str());
  const std::vector<uint8_t> expected = expected_output(c);
  CHECK(result.output.size() == expected.size(), "%s", c.describe().c_str());
  if (c.has_valid_bytes) CHECK(result.output == expected, "%s: not the reference's output", c.describe().c_str());
}

Dimensions random_lead(Random& random) {
  static const Dimensions kLeads[] = {{}, {1}, {3}, {0}, {2, 0, 2}, {2, 1, 3}, {1, 1, 1, 1, 1, 2}, {9}};
  return kLeads[below(random, 8)];
}

int64_t check_right_cases(const std::vector<const OrtCustomOp*>& ops, Random& random) {
  int64_t cases = 0;
  for (const Declaration& op : kDeclarations) {
    for (int i = 0; i < 300; ++i, ++cases) {
      const int64_t rows = below(random, 50), columns = below(random, 140) + (op.gathers ? 0 : 1);
      Dimensions lead = random_lead(random);
      if (op.gathers && rows == 0) lead = {0};
      auto c = right_case(op, lead, rows, columns, below(random, 2) == 0, random);
      for (size_t k = 1; k < kMaxInputs; ++k) c->is_constant[k] = i % 3 != 0;
      CHECK(is_right(*c), "%s", c->describe().c_str());
      check_result(*c, run(ops, c.get()));
    }
  }
  return cases;
}

// One interesting error for each sentence of the glue, and the samples that once read out of bounds.
int64_t check_known_cases(const std::vector<const OrtCustomOp*>& ops, Random& random) {
  struct Known {
    const char* op;
    size_t input;
    Dimensions shape;
    int64_t attribute;
    const char* message;
  };
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  // Each changes a right node of 33 rows, 64 columns and one token: the shape of an input, or the attribute.
  const Known known[] = {
      {"Int4Gather", 2, {33, 0}, 64, "do not fit each other"},
      {"Int4Gather", 2, {0}, 64, "dimensions"},
      {"Int4MatMul", 2, {33, 0}, 0, "multiplier does not fit packed"},
      {"Int4Gather", 9, {}, kMost, "do not fit each other"},
      {"Int4Gather", 9, {}, 200000, "do not fit each other"},
      {"Int4Gather", 9, {}, -1, "cannot have -1 columns"},
      {"Int4Gather", 9, {}, 32, "do not fit each other"},
      {"TernaryMatMul2x4", 9, {}, -1, "negative"},
      {"TernaryMatMul2x4", 9, {}, 0, "does not hold that many rows"},
      {"TernaryMatMul2x4", 9, {}, kMost, "too many"},
      {"TernaryMatMul3x5", 9, {}, 36, "does not hold that many rows"},
      {"TernaryMatMul3x5", 0, {1, 0}, 33, "differ in columns"},
      {"TernaryMatMul3x5", 1, {7, 0}, 33, "no columns"},
      {"TernaryMatMul3x5", 0, {}, 33, "0 dimensions"},
      {"Int8MatMul", 1, {33, 65537}, 0, "too wide"},
      {"Int4MatMul", 1, {33, 4720}, 0, "too wide"},
      {"Int4MatMul", 1, {33, 24}, 0, "whole groups"},
      {"Int4MatMul", 0, {1, 32}, 0, "differ in columns"},
      {"Int4MatMul", 0, {1, 65}, 0, "differ in columns"},
      {"Int8MatMul", 0, {0, int64_t{1} << 61, 64}, 0, "no memory holds"},
      {"Int8MatMul", 0, {-1, 64}, 0, "no memory holds"},
      {"Int8MatMul", 1, {33, 63}, 0, "differ in columns"},
      {"Int8MatMul", 2, {32}, 0, "neither one value nor one a row"},
      {"Int8Gather", 2, {1}, 0, "do not fit each other"},
      {"Int8Gather", 1, {34, 64}, 0, "do not fit each other"},
      {"Int8Gather", 0, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 0, "16 dimensions"},
      {"Int8MatMul", 0, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 64}, 0, "more than 16 dimensions"},
  };
  int64_t cases = 0;
  for (const Known& each : known) {
    for (const Declaration& op : kDeclarations) {
      if (std::strcmp(op.name, each.op) != 0) continue;
      auto c = right_case(op, {1}, 33, 64, false, random);
      if (op.attribute != nullptr) c->attributes[op.attribute] = each.attribute;
      if (each.input < kMaxInputs) {
        c->values[each.input].info.dimensions = each.shape;
        CHECK(fill(c.get(), each.input, 33, random), "too large");
      }
      const Result result = run(ops, c.get());
      CHECK(result.message.find(each.message) != std::string::npos, "%s: %s", c->describe().c_str(),
            result.message.c_str());
      ++cases;
    }
  }
  // Sizes that no memory is needed for.
  auto c = right_case(kDeclarations[4], {0, int64_t{1} << 20}, 0, 64, false, random);
  c->values[1].info.dimensions = {0, int64_t{1} << 58};
  CHECK(fill(c.get(), 1, 0, random), "too large");
  const std::string message = run(ops, c.get()).message;
  CHECK(message.find("too large") != std::string::npos, "%s", message.c_str());
  return cases + 1;
}

struct Counts {
  int64_t refused = 0, accepted = 0;
};

Counts check_hostile_cases(const std::vector<const OrtCustomOp*>& ops, int64_t cases, Random& random) {
  Counts counts;
  for (int64_t i = 0; i < cases; ++i) {
    const Declaration& op = kDeclarations[below(random, kDeclarationCount)];
    auto c = right_case(op, random_lead(random), below(random, 12), below(random, 100), false, random);
    for (int64_t changes = 1 + below(random, 3); changes > 0; --changes) mutate(c.get(), random);
    const int64_t rows = c->shape(1).empty() ? 0 : c->shape(1)[0];
    bool is_small = true;
    for (size_t k = 0; k < op.input_count(); ++k) {
      is_small = is_small && fill(c.get(), k, rows > 0 && rows < 1000 ? rows : 0, random);
    }
    if (!is_small) continue;
    Value& first = c->values[0];
    if (below(random, 8) == 0 && first.content.size() >= 8) {  // an id outside, or a float that is none
      const uint64_t bits = below(random, 2) == 0 ? ~uint64_t{0} >> 1 : random();
      std::memcpy(&first.content[below(random, first.content.size() / 8) * 8], &bits, sizeof bits);
      first.allocate();
    }
    const Result result = run(ops, c.get());
    const bool no_memory = result.message.find("not enough memory") != std::string::npos;
    const bool right =
        is_right(*c) && (c->output_offset == 0 || result.message.find("multiple of 4") == std::string::npos);
    CHECK(no_memory || right == result.message.empty(), "%s is %s, but: %s", c->describe().c_str(),
          right ? "right" : "wrong", result.message.c_str());
    CHECK(result.message.size() < sizeof(Problem), "a sentence that does not end");
    if (result.message.empty()) check_result(*c, result);
    ++(result.message.empty() ? counts.accepted : counts.refused);
  }
  return counts;
}

// Lets each call of the interface fail once; nothing may be left behind.
int64_t check_failing_calls(const std::vector<const OrtCustomOp*>& ops, Random& random) {
  int64_t failures = 0;
  for (const Declaration& op : kDeclarations) {
    for (bool is_constant : {true, false}) {
      for (int64_t calls = 0;; ++calls) {
        auto c = right_case(op, {2}, 9, 40, false, random);
        c->values[0].offset = c->values[op.input_count() - 1].offset = 1;
        for (size_t i = 0; i < op.input_count(); ++i) {
          c->is_constant[i] = i > 0 && is_constant;
          c->values[i].allocate();
        }
        const int64_t before = live_objects;
        calls_to_failure = calls;
        const Result result = run(ops, c.get());
        const bool failed = calls_to_failure < 0;
        calls_to_failure = -1;
        CHECK(live_objects == before, "%s leaves something behind", op.name);
        CHECK(failed == (result.message == "injected"), "%s: %s", op.name, result.message.c_str());
        if (!failed) break;
        ++failures;
      }
    }
  }
  return failures;
}

int64_t check_shape_inference(const std::vector<const OrtCustomOp*>& ops, int64_t cases, Random& random) {
  for (int64_t i = 0; i < cases; ++i) {
    const Declaration& op = kDeclarations[below(random, kDeclarationCount)];
    auto c = right_case(op, random_lead(random), below(random, 9), 1 + below(random, 60), false, random);
    for (int64_t changes = below(random, 3); changes > 0; --changes) mutate(c.get(), random);
    for (size_t k = 0; k < op.input_count(); ++k) {
      for (size_t d = 0; d < c->shape(k).size(); ++d) {
        if (below(random, 4) == 0) c->values[k].info.dimensions[d] = -1;
        if (below(random, 20) != 0) c->values[k].info.names.push_back(below(random, 2) == 0 ? "" : "batch");
      }
    }
    const Node node = node_of(c.get());
    ShapeContext context = {&node, false, {}};
    const int64_t before = live_objects;
    if (below(random, 4) == 0) calls_to_failure = below(random, 14);
    const std::string message = take(ops[&op - kDeclarations]->infer_shape(ops[&op - kDeclarations], &context));
    calls_to_failure = -1;
    CHECK(live_objects == before, "%s leaves something behind", c->describe().c_str());
    if (!context.has_output || !message.empty()) continue;
    CHECK(context.output.dimensions.size() == c->shape(0).size() + op.gathers, "%s", c->describe().c_str());
    CHECK(context.output.dimensions.back() >= 0 && context.output.type == kFloat, "%s", c->describe().c_str());
  }
  return cases;
}

// One kernel, several callers, each with threads of its own.
void check_threads(const std::vector<const OrtCustomOp*>& ops, Random& random) {
  for (const Declaration& declaration : kDeclarations) {
    const OrtCustomOp* op = ops[&declaration - kDeclarations];
    auto c = right_case(declaration, {11}, 700, 300, false, random);
    const Node node = node_of(c.get());
    void* kernel = nullptr;
    const std::string message = take(op->create_kernel(op, as_api(), &node, &kernel));
    CHECK(message.empty(), "%s", message.c_str());
    const std::vector<uint8_t> expected = expected_output(*c);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
      callers.emplace_back([&] {
        for (size_t threads = 0; threads < 4; ++threads) {
          Context context = {&node, threads, 0, {}, {}};
          CHECK(take(op->compute(kernel, &context)).empty(), "an error on a thread");
          CHECK(std::memcmp(context.output.data(), expected.data(), expected.size()) == 0, "%s differs",
                op->get_name(op));
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    op->destroy_kernel(kernel);
  }
}

void check_first_registration() {
  const OrtApiBase old_base = {get_old_api, nullptr}, no_base = {get_no_api, nullptr};
  Options options;
  CHECK(take(RegisterCustomOps(&options, &old_base)).find("older than 1.17") != std::string::npos, "an old version");
  CHECK(take(RegisterCustomOps(&options, &no_base)).empty() && options.domains.empty(), "no version");
  for (int64_t calls = 0;; ++calls) {
    calls_to_failure = calls;
    const std::string message = take(RegisterCustomOps(&options, &kBase));
    const bool failed = calls_to_failure < 0;
    calls_to_failure = -1;
    if (!failed) break;
    CHECK(message == "injected", "%s", message.c_str());
    // The domain stays once it is whole.
    CHECK(live_objects <= (calls > static_cast<int64_t>(kAllOps)), "a registration leaves something behind");
  }
  CHECK(registered_ops() == registered_ops() && live_objects == 1, "a second registration makes another domain");
}

int check_concurrent_registration() {
  std::vector<std::vector<const OrtCustomOp*>> ops(8);
  std::vector<std::thread> threads;
  for (auto& each : ops) threads.emplace_back([&each] { each = registered_ops(); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& each : ops) CHECK(each == ops[0], "two domains");
  CHECK(live_objects == 1, "%lld domains", static_cast<long long>(live_objects.load()));
  return 0;
}

int check_variant(int64_t cases, uint64_t seed) {
  const char* problem = nullptr;
  const Kernels* kernels = active_variant(&problem);
  CHECK(kernels != nullptr, "%s", problem);
  Random random(seed);
  check_first_registration();
  const std::vector<const OrtCustomOp*> ops = registered_ops();
  const int64_t right = check_right_cases(ops, random), known = check_known_cases(ops, random);
  const Counts hostile = check_hostile_cases(ops, cases, random);
  const int64_t failures = check_failing_calls(ops, random), shapes = check_shape_inference(ops, cases, random);
  check_threads(ops, random);
  const int64_t layers = check_layers(ops.data() + kDeclarationCount, cases / 4, random);
  check_mask(ops[kAllOps - 2], cases / 4, random);
  check_rotation(ops[kAllOps - 1], cases / 4, random);
  CHECK(live_objects == 1, "something is left behind");
  std::printf(
      "%s: %lld right nodes equal; %lld known and %lld random nodes refused, %lld right; %lld failing calls, %lld "
      "shapes; %lld layers; seed %llu\n",
      kernels->name, static_cast<long long>(right), static_cast<long long>(known),
      static_cast<long long>(hostile.refused), static_cast<long long>(hostile.accepted),
      static_cast<long long>(failures), static_cast<long long>(shapes), static_cast<long long>(layers), static_cast<unsigned long long>(seed));
  return 0;
}

// This program again, with another variant.
int run_child(const char* program, const char* variant, const char* cases, const char* seed) {
  setenv("MICROVLM_KERNELS", variant, 1);
  const char* arguments[] = {program, cases, seed, "child", nullptr};
  pid_t child = 0;
  int status = 0;
  if (posix_spawn(&child, "/proc/self/exe", nullptr, nullptr, const_cast<char**>(arguments), environ) != 0) return 1;
  if (waitpid(child, &status, 0) != child) return 1;
  if (status != 0) std::fprintf(stderr, "%s %s %s fails with variant %s\n", program, cases, seed, variant);
  return status != 0;
}

}  // namespace

int main(int argc, char** argv) {
  const char *cases = argc > 1 ? argv[1] : "20000", *seed = argc > 2 ? argv[2] : "1";
  if (argc > 3) {
    return std::atoll(cases) == 0 ? check_concurrent_registration()
                                  : check_variant(std::atoll(cases), std::strtoull(seed, nullptr, 10));
  }
  int failures = run_child(argv[0], "", "0", seed);
  for (int64_t i = 0; i < variant_count(); ++i) failures += run_child(argv[0], variant(i).name, cases, seed);
  return failures == 0 ? 0 : 1;
}
