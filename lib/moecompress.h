/* moecompress: offline compression of Mixture-of-Experts language models. This header is the whole public interface;
 * programs include it and nothing else of the library. */
#ifndef MOECOMPRESS_H
#define MOECOMPRESS_H

#include "base/err.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/opt.h"
#include "base/par.h"
#include "base/version.h"
#include "base/word.h"

#include "num/gemm.h"
#include "num/tensor.h"
#include "num/weight.h"

#include "ckpt/ckpt.h"
#include "ckpt/gguf.h"
#include "ckpt/gguf_write.h"
#include "ckpt/place.h"
#include "ckpt/safetensors.h"
#include "ckpt/writer.h"

#include "text/corpus.h"
#include "text/tokenizer.h"

#include "model/family.h"
#include "model/gguf_open.h"
#include "model/model.h"

#include "calib/calibrate.h"
#include "calib/eval.h"
#include "calib/observe.h"
#include "calib/pass.h"
#include "calib/sensitivity.h"
#include "calib/stats.h"

#include "method/betas.h"
#include "method/factor.h"
#include "method/grain.h"
#include "method/method.h"
#include "method/nested.h"
#include "method/patterns.h"
#include "method/plan.h"
#include "method/served.h"
#include "method/thresholds.h"
#include "method/widths.h"

#include "run/apply.h"
#include "run/convert.h"
#include "run/factor.h"
#include "run/format.h"
#include "run/gguf_importance.h"
#include "run/gguf_measure.h"
#include "run/gguf_model.h"
#include "run/gguf_tokenizer.h"
#include "run/gguf_types.h"
#include "run/gguf_words.h"
#include "run/imatrix.h"
#include "run/measure.h"
#include "run/preview.h"
#include "run/quantize.h"
#include "run/quantize_plan.h"
#include "run/repair.h"
#include "run/share.h"
#include "run/thin.h"
#include "run/verify.h"
#include "run/work.h"

#endif
