/* Re-opens an output and proves it: structure, numbers, names and shapes, every byte against the source, hashes against the
 * manifest, and which clients will load it. */
#ifndef MOEC_RUN_VERIFY_H
#define MOEC_RUN_VERIFY_H

#include "base/json.h"
#include "method/plan.h"
#include "model/model.h"

enum { MOEC_VERIFY_SHOWN = 20, MOEC_VERIFY_CLIENTS = 8 };

typedef struct moec_client {
    const char *name;
    bool loads;
    const char *rule;  /* the first that is broken; "": none */
    char reason[280];  /* one line: why (not), and what to do */
    char advice[160];  /* what loads, but not well; "": nothing */
} moec_client;

typedef struct moec_verify_report {
    bool against_source, has_manifest;
    uint64_t files, tensors, bytes;          /* bytes: of all tensors */
    uint64_t fitted;                         /* tensors whose values were computed anew: the manifest's hash is all there is */
    int64_t experts, top_k;
    uint64_t problems;                       /* 0: all is well */
    char problem[MOEC_VERIFY_SHOWN][400];    /* the first ones */
    int n_clients;
    moec_client client[MOEC_VERIFY_CLIENTS];
} moec_verify_report;

typedef struct moec_verify_options {
    const moec_model *source; /* NULL: structure and manifest alone */
    const char *source_fingerprint; /* when the caller has it already; NULL: it is computed */
    bool data;                /* compare (with a source) and hash all shards; otherwise the caller just did */
    bool unfinished;          /* the mark of an unfinished output may be there */
} moec_verify_options;

/** Checks a folder that this program wrote, with experts that are factors, too (then no model is bound: shapes are held against the plan
 *  where there is a source). Whatever is wrong with the folder is a problem in the report, not an error.
 *  @return MOEC_OK (look at out->problems); MOEC_EIO, MOEC_ENOMEM, MOEC_EINTR. Free with moec_verify_free.
 *  Cost: with data, one read of the output and one of the kept bytes of the source, on all threads. */
MOEC_API moec_status moec_verify(moec_verify_report **out, const char *dir, const moec_verify_options *opt, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_verify_free(moec_verify_report *r);
/** {"ok", "against_source", "manifest", "files", "tensors", "bytes", "experts", "top_k", "problems": [..], "clients": {name:
 *  {"loads", "reason", "advice"}}} */
MOEC_API moec_json *moec_verify_json(const moec_verify_report *r);

/** Which clients load a model of this form; also what `inspect` shows. Returns how many, at most MOEC_VERIFY_CLIENTS. */
MOEC_API int moec_clients(moec_client *out, const moec_model *m);
/** The same of what a plan that fits the model makes of it; NULL: the model as it is. */
MOEC_API int moec_clients_of(moec_client *out, const moec_model *m, const moec_plan *p);
/** Refuses a plan whose output a client of the list "CLIENT[,CLIENT]" or "all" would not load; else *n of them in `out`
 *  [MOEC_VERIFY_CLIENTS]. MOEC_EINVAL: no such client; MOEC_EFORMAT: the text names client, rule and remedy. */
MOEC_API moec_status moec_compat_check(moec_client *out, int *n, const char *list, const moec_model *m,
                                       const moec_plan *p, moec_err *err) MOEC_USE_RESULT;

#endif
