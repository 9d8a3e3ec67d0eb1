/* See quantize_stats.h. */
#include "quantize_stats.h"

#include <string.h>

moec_status tool_found_stats(moec_stats **out, const moec_model *m, const moec_corpus *corpus, moec_compute compute, const char *path,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_err other = {MOEC_OK, ""};
    moec_stats *found = NULL;
    *out = NULL;
    if (moec_stats_load(&found, path, &other) != MOEC_OK)
        return MOEC_OK;
    bool same = strcmp(found->meta.compute, compute == MOEC_COMPUTE_BF16 ? "bf16" : "f32") == 0 &&
                found->n_domains == corpus->n_domains && moec_stats_check(found, m, &other) == MOEC_OK;
    for (int d = 0; same && d < corpus->n_domains; d++) {
        const moec_corpus one = {1, corpus->domain + d};
        moec_digest digest;
        int at;
        MOEC_TRY(moec_corpus_digest(&digest, &one, err));
        same = moec_stats_domain_find(&at, found, corpus->domain[d].name, &other) == MOEC_OK &&
               strcmp(found->domain[at].digest, digest.hex) == 0;
    }
    if (same) {
        if (moec_calibrate_unfinished(path)) /* killed right behind writing the file */
            MOEC_TRY(moec_calibrate_forget(path, err));
        *out = found;
        found = NULL;
    }
done:
    moec_stats_free(found);
    return st;
}
