// The custom operators of the fused layers, of the decoder's mask and of its rotation; ort_op.cpp registers all.
#pragma once

#include <atomic>

#include "layers/layer_declarations.h"
#include "ort_abi.h"

// The table that registered first: ONNX Runtime infers shapes without handing it over.
extern std::atomic<const OrtApi*> first_api;

// That of kLayers[i].
const OrtCustomOp* layer_op(size_t i);
const OrtCustomOp* mask_op();
const OrtCustomOp* rotation_op();
