/* Options of the verbs that run text through a model, and how they become a corpus. */
#ifndef MOEC_TOOLS_TOOL_TEXT_H
#define MOEC_TOOLS_TOOL_TEXT_H

#include "tool.h"

typedef struct tool_text {
    moec_opt_list text;
    int64_t seq_len, max_windows, tokens;
    bool bos;
    int compute; /* a moec_compute */
} tool_text;

extern const char *const tool_compute_names[];

#define TOOL_SEQ_LEN "512" /* by default */

/* T: the verb's parameter struct, f its tool_text. */
#define TOOL_TEXT_ROWS_OF(T, f)                                                                                        \
    {.name = "text", .letter = 't', MOEC_LIST(T, f.text), .value = "[NAME=]FILE[:WEIGHT]",                         \
     .help = "text to run: files, or a folder of *.txt and *.ids; each file is one domain. A file ending in .ids holds " \
             "token ids, one window a line"},                                                                          \
    {.name = "seq-len", MOEC_INT(T, f.seq_len), .fallback = TOOL_SEQ_LEN, .lo = 2, .hi = 1 << 20, .value = "N",           \
     .help = "tokens of a window"},                                                                                    \
    {.name = "max-windows", MOEC_INT(T, f.max_windows), .fallback = "0", .lo = 0, .hi = 1e12, .value = "N",        \
     .help = "at most N windows of each file; 0: all"},                                                                \
    {.name = "tokens", MOEC_INT(T, f.tokens), .fallback = "0", .lo = 0, .hi = 1e12, .value = "N",                  \
     .help = "at most N tokens in all, shared over the texts by weight; 0: all"},                                      \
    {.name = "bos", MOEC_FLAG(T, f.bos),                                                                           \
     .help = "begin every window with the tokenizer's beginning-of-sequence token"}

/* Compute mode, with the verb's own default. */
#define TOOL_COMPUTE_ROW_OF(T, f, mode)                                                                                \
    {.name = "compute", MOEC_CHOICE(T, f.compute), .fallback = mode, .choices = tool_compute_names,                \
     .value = "f32|bf16",                                                                                              \
     .help = "arithmetic of the matrix products; the router is float32 in both, bf16 is faster where the CPU has it"}

/* Of a struct with a `tool_text input;`. */
#define TOOL_TEXT_ROWS(T) TOOL_TEXT_ROWS_OF(T, input)
#define TOOL_COMPUTE_ROW(T, mode) TOOL_COMPUTE_ROW_OF(T, input, mode)

/** Tokenizes what --text names with the tokenizer of `model`. seed < 0: limits keep the first windows of a text. Says how
 *  many ill-formed UTF-8 parts were replaced. Errors of moec_corpus_read and moec_tokenizer_load; MOEC_EINVAL without --text. */
moec_status tool_read_text(moec_corpus *out, const tool_text *t, const moec_model *model, int64_t seed, moec_err *err)
    MOEC_USE_RESULT;

/** Does anything say how text is to be read, in another way than the defaults? */
bool tool_text_options_given(const tool_text *t);

#endif
