// What every custom operator of this library has in common: fixed answers, and how the kernel of a node is made.
#pragma once

#include <cstdlib>
#include <new>

#include "ort_values.h"

namespace {

inline void answer_as_every_op(OrtCustomOp* op) {
  op->version = kApiVersion;
  op->get_execution_provider = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op->get_input_characteristic = op->get_output_characteristic = op->get_input_memory_type =
      [](const OrtCustomOp*, size_t) { return 0; };  // required; required; the provider's own memory
  op->get_start_version = op->get_end_version = [](const OrtCustomOp*) { return 1; };
}

template <class NodeKernel>
void destroy_kernel(void* handle) {
  static_cast<NodeKernel*>(handle)->~NodeKernel();
  std::free(handle);
}

// Makes the kernel of a node of `DeclaredOp`: its interface, declaration and variant, and what `prepare` looks up.
template <class DeclaredOp, class NodeKernel, Status (*prepare)(const void* info, NodeKernel* kernel)>
Status create_kernel(const OrtCustomOp* op, const OrtApi* api, const void* info, void** kernel) {
  const char* problem = nullptr;
  const microvlm::Kernels* kernels = microvlm::active_variant(&problem);
  if (kernels == nullptr) return fail(api, kInvalidArgument, problem);
  void* memory = std::malloc(sizeof(NodeKernel));
  if (memory == nullptr) return fail(api, kRuntimeException, "not enough memory");
  auto* created = new (memory) NodeKernel;
  created->api = api;
  created->op = static_cast<const DeclaredOp*>(op)->declaration;
  created->kernels = kernels;
  Status status = prepare(info, created);
  if (status == nullptr) {
    *kernel = created;
  } else {
    destroy_kernel<NodeKernel>(created);
  }
  return status;
}

}  // namespace
