/* How verbs that carry out a plan show it, write it and report. */
#ifndef MOEC_TOOLS_OUTPUT_H
#define MOEC_TOOLS_OUTPUT_H

#include "tool.h"

typedef struct tool_job {
    const tool_common *common;
    const moec_model *model;
    const char *fingerprint; /* of the model */
    moec_plan *plan; /* repair adds to it */
    const moec_override *weights; /* computed anew by an earlier run, of a plan from a file; NULL: none */
    const moec_method *thin; /* grain neurons or weights: the plan's weights are made by this method, */
    const moec_request *request; /* asked so; NULL: none are */
    const moec_repair_opts *repair; /* NULL: none; work, resume, max_memory, and with it thin and request are set here */
    const moec_factor_opts *factor; /* the plan is one of factors, made so; work, resume and max_memory are set here; NULL: none */
    const moec_quantize_opts *quantize; /* the plan is one of few bits, rounded so; work, resume and max_memory are set here; NULL: none */
    const moec_quantize_report *quantized; /* what came of that; set here */
    const char *record; /* file for a line about every quantized matrix, or NULL */
    const moec_stats *stats; /* a dry run says what the removed experts served; NULL: there are none */
    const char *output; /* folder, or file with plan_only; NULL: none was given */
    const char *compat; /* clients that must load the output, or NULL */
    bool plan_only;
    double began;       /* moec_now() when the verb began */
} tool_job;

/* T: the verb's parameter struct with a `const char *field;`. */
#define TOOL_COMPAT_ROW(T, field)                                                                                      \
    {.name = "compat", MOEC_TEXT(T, field), .value = "CLIENT[,CLIENT]|all",                                            \
     .help = "refuse at the start what transformers, vllm, sglang or llama.cpp would not load, naming the rule"}

#define TOOL_PLAN_ONLY_ROW(T, about) {.name = "plan-only", MOEC_FLAG(T, plan_only), .help = "write the plan " about ", and no model"}

/** Carries the job out (or, by its options, only writes the plan or shows what would be done) and prints the result.
 *  MOEC_EINVAL without an output where one is needed; else what moec_apply returns. */
moec_status tool_carry_out(const tool_job *j, moec_err *err) MOEC_USE_RESULT;
/** Is there a place for what the job will write? Hours of work must not end at an output that was there before: tool_carry_out asks
 *  before it computes weights, a verb before what it computes itself. MOEC_EINVAL: no output; MOEC_EEXIST, MOEC_EIO, MOEC_ENOMEM. */
moec_status tool_check_room(const tool_job *j, moec_err *err) MOEC_USE_RESULT;
/** Writes nested plans to their files, after all of them were found writable, and prints what they keep. job->plan and
 *  job->output are not read. MOEC_EEXIST, MOEC_EIO, MOEC_EFORMAT: a client named by --compat would not load one. */
moec_status tool_write_plans(const tool_job *job, moec_plan *const *plan, const char *const *path, int n, moec_err *err)
    MOEC_USE_RESULT;

#endif
