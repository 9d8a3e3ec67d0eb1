/* Two models over the same text in lock-step, the original and its smaller twin, and what one MoE layer of the twin is to do.
 * Private to repair.c and the files that it is made of. */
#ifndef MOEC_RUN_LOCKSTEP_H
#define MOEC_RUN_LOCKSTEP_H

#include "method/repair.h"
#include "run/preview.h"
#include "run/repair.h"

struct moec_repair {
    moec_work work;
};

typedef struct moec_lockstep {
    const moec_model *m;
    moec_plan *p;
    const moec_repair_opts *o;
    moec_repair *r;
    moec_preview twin;
    moec_pass *first, *second; /* the original's, the twin's */
    int64_t *row;              /* [windows] where a window's tokens stand: fitted ones first, held-out ones behind */
    int64_t *window;           /* [chunks] number of a chunk's first window */
    int64_t *text;             /* [domains + 1] first fitted token of each domain, and n_fit */
    double *text_weight;       /* [domains] */
    int64_t n, n_fit, ld, slots;
    float *x, *y;              /* [n,H] */
    float *logits;             /* [n,ld] */
    float *weight;             /* [n] */
    int32_t *ids;              /* [n,slots] */
    float *gates;
    moec_merge_groups groups;  /* of the layer at hand, where experts are merged */
    uint64_t thin_bytes;       /* of a worker that makes experts thinner, and how many there are of these */
    int64_t workers;
    int64_t seen, few;         /* experts whose tokens were counted, and those with fewer of them than neurons */
    moec_progress progress;
} moec_lockstep;

enum {
    MOEC_LOCKSTEP_EVERY = 8,                    /* of the windows, one is held out */
    MOEC_REPAIR_RIDGE_SWEEPS = 2, MOEC_REPAIR_DENSE = 4096,
    MOEC_REPAIR_UP_SWEEPS = 1, MOEC_REPAIR_UP_STEPS = 3,
    MOEC_REPAIR_EPOCHS = 6,                     /* of gradient steps */
    MOEC_REPAIR_BATCH = 256,
    MOEC_REPAIR_BLOCK_VALUES = 1 << 22,
};

/* --- lockstep.c ------------------------------------------------------------------------------------------------------- */

/* Counts the windows of the corpus and says where their tokens stand. */
moec_status moec__lockstep_place(moec_lockstep *u, moec_err *err) MOEC_USE_RESULT;
/* u->window, for u->first. */
moec_status moec__lockstep_chunks(moec_lockstep *u, moec_err *err) MOEC_USE_RESULT;
/* Row of the first token of a chunk's window, of either pass: both have the same chunks. */
int64_t moec__lockstep_row(const moec_lockstep *u, const moec_pass *p, const moec_chunk *c, int64_t seq);
/* Options of the first pass. `spare`: the least that the second can do with is kept free for it. */
moec_pass_opts moec__lockstep_opts(uint64_t *spare, const moec_lockstep *u);
/* The two passes and the sample's arrays. */
moec_status moec__lockstep_room(moec_lockstep *u, moec_err *err) MOEC_USE_RESULT;
void moec__lockstep_release(moec_lockstep *u);
/* The original runs `layer`; of an MoE layer what is needed of it is kept. */
moec_status moec__lockstep_first(moec_lockstep *u, int64_t layer, moec_err *err) MOEC_USE_RESULT;
/* The twin looks at MoE layer `layer`, which the original has run: x, y, logits, weight. */
moec_status moec__lockstep_look(moec_lockstep *u, int64_t layer, moec_err *err) MOEC_USE_RESULT;
/* ids and gates of the sample's first n tokens by their logits as they are and the rule of model m, the twin or the original. */
moec_status moec__lockstep_route(moec_lockstep *u, const moec_model *m, const moec_layer *l, int64_t n, moec_err *err) MOEC_USE_RESULT;
/* sum w |y|^2 of both parts, weights scaled to 1 on average over fitted tokens. */
moec_repair_error moec__lockstep_wanted(moec_lockstep *u);

/* --- repair_layer.c --------------------------------------------------------------------------------------------------- */

/* Are weights of layers computed at all? */
bool moec__repair_fits(const moec_repair_opts *o);
/* All that is in the draft of a set. */
uint32_t moec__repair_drafted(const moec_lockstep *u, int64_t set);
int moec__repair_epochs(const moec_repair_opts *o);
/* Chooses, merges and fits the experts of a set, or takes over what an earlier run did; the original has run the layer, the twin
 * is in front of it. */
moec_status moec__repair_layer(moec_lockstep *u, int64_t set, moec_err *err) MOEC_USE_RESULT;
/* A line of everything in this file that decides the result. Free with moec_free. */
moec_status moec__repair_identity(char **out, const moec_lockstep *u, moec_err *err) MOEC_USE_RESULT;

/* --- merge_layer.c ---------------------------------------------------------------------------------------------------- */

/* Can the plan's layers be merged so? MOEC_EINVAL as moec_merge_check says, MOEC_ENOMEM. */
moec_status moec__merge_possible(moec_lockstep *u, moec_err *err) MOEC_USE_RESULT;
/* Forms the groups of a set from the sample as it is: u->groups, the plan's keep list and `into`. */
moec_status moec__merge_layer(moec_lockstep *u, int64_t set, moec_err *err) MOEC_USE_RESULT;
/* Merged weights into a set's draft. */
moec_status moec__merge_draft(moec_lockstep *u, int64_t set, const moec_draft *d, moec_err *err) MOEC_USE_RESULT;
/* Logits [n_fit,n_keep] with which each group has its members' probability, from all experts' in u->logits. Free with moec_free. */
moec_status moec__merge_logits(float **want, const moec_lockstep *u, const moec_plan_layer *pl, moec_err *err) MOEC_USE_RESULT;
/* Each group is fitted (down) merged and as its centre alone; what is better on held-out tokens stays, in the draft, in t->rest and in
 * the plan's `into`. t is started. */
moec_status moec__merge_decide(moec_lockstep *u, moec_plan_layer *pl, moec_repair_task *t, const moec_ridge_opts *ridge, moec_err *err)
    MOEC_USE_RESULT;
size_t moec__merge_bytes(const moec_lockstep *u);

/* --- repair_record.c -------------------------------------------------------------------------------------------------- */

/* What was found out about a layer, beside its weights (of `sheet`; NULL: there are none). */
moec_status moec__record_write(const moec_lockstep *u, const moec_plan_layer *pl, const moec_sheet *sheet, moec_err *err)
    MOEC_USE_RESULT;
/* `found`: the layer was done by an earlier run. */
moec_status moec__record_read(bool *found, const moec_lockstep *u, moec_plan_layer *pl, moec_err *err) MOEC_USE_RESULT;

#endif
