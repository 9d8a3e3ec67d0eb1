/* quantize --sweep: what each of several budgets would cost, as a table or as JSON. */
#ifndef MOEC_TOOLS_SWEEP_H
#define MOEC_TOOLS_SWEEP_H

#include "tool.h"

/* One of them: 4.5 is bits, 10GiB bytes; the other is 0. */
typedef struct tool_budget {
    const char *word; /* as it was given */
    double bits;
    uint64_t bytes;
} tool_budget;

typedef struct tool_sweep_form {
    /* Adds to `row` what the budget costs. MOEC_ENOFIT: it cannot be met, `err` says why; any other failure ends the sweep. */
    moec_status (*fill)(moec_json *row, void *ctx, const tool_budget *b, moec_err *err);
    void *ctx;
    const char *head; /* of the columns behind the budget */
    void (*print)(const moec_json *row); /* these columns, and the end of the line */
    const char *foot;
} tool_sweep_form;

/** Fills and prints the row of each of `budgets`, "B,B,..", when all of them are there. A budget that cannot be met is a row, too,
 *  unless none can be. MOEC_EINVAL: a size that is none; what `fill` fails with. */
moec_status tool_sweep(const char *budgets, const tool_sweep_form *form, bool json, moec_err *err) MOEC_USE_RESULT;
/** The number `key` of a row, NAN where there is none. */
double tool_sweep_number(const moec_json *row, const char *key);

#endif
