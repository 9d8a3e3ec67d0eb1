/* What llama.cpp calls the tensors of a layer, by role: "blk.N." stands before them. For writing (run/gguf_model.c) and reading
 * (model/gguf_open.c). Source: the Python package gguf 0.19, constants.py. */
#ifndef MOEC_MODEL_GGUF_NAMES_H
#define MOEC_MODEL_GGUF_NAMES_H

#include "model/family.h"

/* Without ".weight" and ".bias"; NULL: none. MOEC_VEC_NORM_MLP is by moec_gguf_rules.mlp_norm, MOEC_MAT_KV_B in two parts. */
extern MOEC_API const char *const moec_gguf_mats[MOEC_MAT_COUNT];
/* With what stands behind them. */
extern MOEC_API const char *const moec_gguf_vecs[MOEC_VEC_COUNT];
/* gate, up, down of all experts of a layer. */
extern MOEC_API const char *const moec_gguf_experts[3];

#endif
