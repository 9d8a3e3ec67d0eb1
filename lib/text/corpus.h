/* Texts given on the command line, as windows of token ids: one domain for each file. Reads `--text` arguments,
 * tokenizes, cuts and chooses windows; what is done with them is the layer pass's business. */
#ifndef MOEC_TEXT_CORPUS_H
#define MOEC_TEXT_CORPUS_H

#include "base/err.h"
#include "base/hash.h"
#include "text/tokenizer.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct moec_domain {
    char *name, *path;
    double weight; /* > 0 */
    int32_t *ids;  /* [n_ids] of the chosen windows, one after the other */
    int64_t n_ids;
    int64_t *start;    /* [n_windows + 1]; window w is ids[start[w]] .. ids[start[w+1] - 1] */
    int64_t n_windows; /* >= 1, each of 2 .. seq_len ids */
    int64_t n_invalid; /* ill-formed UTF-8 parts that were read as U+FFFD; warn when not 0 */
    int64_t n_dropped; /* ids read but in no window because a rest of one id alone predicts nothing */
} moec_domain;

typedef struct moec_corpus {
    int n_domains;
    moec_domain *domain; /* [n_domains] in the order of the arguments, a folder's files sorted by name */
} moec_corpus;

typedef struct moec_corpus_opts {
    int64_t vocab;       /* embedding rows of the model: every id is below it. > 0 */
    int64_t seq_len;     /* ids in a window, >= 2 */
    int64_t max_windows; /* for each file; 0: all */
    int64_t max_tokens;  /* in all windows of all files, bos included; 0: all */
    int64_t seed;        /* which windows a limit keeps: < 0 the first, >= 0 a choice that depends on the seed, the
                            domain's name and its number of windows only */
    bool add_bos;        /* text files only: every window begins with bos and holds seq_len ids with it */
    int32_t bos;         /* -1: the tokenizer's */
} moec_corpus_opts;

/** True when an argument names a file or a folder with a file that is not .ids, so that a tokenizer is needed. An
 * argument that is not there counts as text. */
MOEC_API moec_status moec_corpus_needs_tokenizer(bool *out, const char *const *args, int n_args,
                                                 moec_err *err) MOEC_USE_RESULT;

/**
 * Reads `--text` arguments.
 *
 *   name=path[:weight]   one file under that name
 *   path[:weight]        one file; its name is the base name without extension
 *   folder[:weight]      every *.txt and *.ids in it (not below it), sorted by file name, each with that weight
 *
 * ":weight" is a number > 0 (default 1) and is looked for only when the whole is not itself an existing path;
 * likewise "name=" only when the whole argument is not one.
 *
 * A text file (at most 4 GiB) is one stream of ids without special ones, cut into windows of seq_len that do not
 * overlap; a shorter last window is kept when it holds at least 2 ids. A file ending in ".ids" holds one window a
 * line, ids separated by blanks; longer lines are cut like texts, empty lines are skipped, no bos is added.
 * max_windows is applied to each file, then max_tokens is divided over the domains in proportion to their weights;
 * what a domain is too short to use goes to the others. So that the shares are met to the id, one window of each
 * domain, the last one chosen, may be cut short (a single id that would be left is not used). Chosen windows stay in
 * the order of the file.
 *
 * @param out   filled; release with moec_corpus_release. Empty on failure.
 * @param tok   borrowed; may be NULL when all files are .ids.
 * @return MOEC_OK;
 *         MOEC_EINVAL for no argument, a bad option or weight, an empty name, two domains of one name (the text names
 *         both files), a folder without files or with a name, max_tokens that leaves less than 2 to some domain, text
 *         without a tokenizer, add_bos without a bos;
 *         MOEC_EIO when a file cannot be read;
 *         MOEC_EFORMAT when a file gives no window (empty text) or is larger than 4 GiB, when a word in an .ids file is
 *         not an id below vocab (file and line are named), when an id of the tokenizer is not below vocab (tokenizer
 *         and model disagree), and what moec_encode says;
 *         MOEC_ENOMEM.
 * Cost: reads and tokenizes each file once; with seed < 0 and a limit only as far as needed. Memory: the largest file
 * about three times, and 4 bytes for each id read. Same result on any machine.
 */
MOEC_API moec_status moec_corpus_read(moec_corpus *out, const char *const *args, int n_args,
                                      const moec_tokenizer *tok, const moec_corpus_opts *opts,
                                      moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_corpus_release(moec_corpus *c);

/** Ids in all windows of all domains. */
MOEC_API int64_t moec_corpus_tokens(const moec_corpus *c);

/** XXH3-128 over, for each domain in order: its name, number of windows, window borders and ids (little endian);
 * weights and paths are left out. MOEC_ENOMEM. */
MOEC_API moec_status moec_corpus_digest(moec_digest *out, const moec_corpus *c, moec_err *err) MOEC_USE_RESULT;

#endif
