/* See tool_text.h. */
#include "tool_text.h"

#include <inttypes.h>
#include <stdlib.h>

const char *const tool_compute_names[] = {[MOEC_COMPUTE_F32] = "f32", [MOEC_COMPUTE_BF16] = "bf16", NULL};

bool tool_text_options_given(const tool_text *t)
{
    return t->seq_len != strtoll(TOOL_SEQ_LEN, NULL, 10) || t->max_windows > 0 || t->tokens > 0 || t->bos;
}

moec_status tool_read_text(moec_corpus *out, const tool_text *t, const moec_model *model, int64_t seed, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_tokenizer *tok = NULL;
    bool needed = false;
    moec_corpus_opts o = {.vocab = model->dims.vocab, .seq_len = t->seq_len, .max_windows = t->max_windows,
                          .max_tokens = t->tokens, .seed = seed, .add_bos = t->bos, .bos = -1};
    if (t->text.n == 0)
        return moec_fail(err, MOEC_EINVAL, "--text is missing: which text shall the model read?");
    MOEC_TRY(moec_corpus_needs_tokenizer(&needed, t->text.at, t->text.n, err));
    if (needed) {
        MOEC_TRY(moec_model_tokenizer(&tok, model, err));
        if (!tok)
            MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s%s; give token ids instead, in a file that ends in .ids", moec_ckpt_dir(model->ckpt),
                               moec_ckpt_gguf(model->ckpt) ? ": has no tokenizer" : "/tokenizer.json: is not there"));
    }
    MOEC_TRY(moec_corpus_read(out, t->text.at, t->text.n, tok, &o, err));
    for (int i = 0; i < out->n_domains; i++)
        if (out->domain[i].n_invalid > 0)
            moec_warn("%s: %" PRId64 " places are not UTF-8 and were read as U+FFFD", out->domain[i].path,
                      out->domain[i].n_invalid);
done:
    moec_tokenizer_free(tok);
    return st;
}
