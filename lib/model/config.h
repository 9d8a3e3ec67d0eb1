/* Numbers of a config.json, read by a family's key names and checked. */
#ifndef MOEC_MODEL_CONFIG_H
#define MOEC_MODEL_CONFIG_H

#include "model/model.h"

/** Fills dims and the two key names. MOEC_EFORMAT: see moec_model_open. */
MOEC_API moec_status moec_config_read(moec_dims *out, const char **key_experts, const char **key_top_k,
                                      const moec_family *f, const moec_json *config, moec_err *err) MOEC_USE_RESULT;
/** True when layer i has no router by the family's rule; for a config that moec_config_read took. */
MOEC_API bool moec_config_is_dense(const moec_family *f, const moec_json *config, int64_t layer);

#endif
