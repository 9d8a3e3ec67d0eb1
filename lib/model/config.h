/* Numbers of a config.json, read by a family's key names and checked. */
#ifndef MOEC_MODEL_CONFIG_H
#define MOEC_MODEL_CONFIG_H

#include "model/model.h"

/** Reads m->config by m->family's keys into m->dims and m->key_*. MOEC_EFORMAT: see moec_model_open. */
MOEC_API moec_status moec_config_read(moec_model *m, moec_err *err) MOEC_USE_RESULT;
/** Sets mixer, window, chunk and rotated of layer l->index; for a config that moec_config_read took. */
MOEC_API void moec_config_layer(moec_layer *l, const moec_model *m);
/** True when layer i has no router by the family's rule. */
MOEC_API bool moec_config_is_dense(const moec_model *m, int64_t layer);
/** Rows and columns that share a scale: weight_block_size of the quantization_config of config.json, or of its text_config;
 *  0, 0: there is none. MOEC_EFORMAT: not two numbers from 1 to 65536. */
MOEC_API moec_status moec_config_fp8_block(int32_t block[2], const moec_model *m, moec_err *err) MOEC_USE_RESULT;
/** Sets packed, zero_more and read_bits by what config.json says of codes of few bits. MOEC_EFORMAT: in a form that is not read. */
MOEC_API moec_status moec_config_packed(moec_model *m, moec_err *err) MOEC_USE_RESULT;

#endif
