/* Writes to stderr only. Progress is redrawn at most five times a second, or a line each ten seconds in a log. */
#include "base/log.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static moec_level level = MOEC_NORMAL;
static _Atomic bool bar_shown; /* a progress line without newline is on the terminal */
static volatile sig_atomic_t interrupted;

void moec_log_set(moec_level l)
{
    level = l;
}

static void print_line(const char *prefix, const char *fmt, va_list ap) MOEC_PRINTF(2, 0);
static void print_line(const char *prefix, const char *fmt, va_list ap)
{
    char text[1400];
    vsnprintf(text, sizeof text, fmt, ap);
    moec_plain_line(text);
    fprintf(stderr, "%smoecompress: %s%s\n", bar_shown ? "\r\033[K" : "", prefix, text);
    bar_shown = false;
}

void moec_say(const char *fmt, ...)
{
    if (level < MOEC_NORMAL)
        return;
    va_list ap;
    va_start(ap, fmt);
    print_line("", fmt, ap);
    va_end(ap);
}

void moec_warn(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    print_line("warning: ", fmt, ap);
    va_end(ap);
}

void moec_note(const char *fmt, ...)
{
    if (level < MOEC_VERBOSE)
        return;
    va_list ap;
    va_start(ap, fmt);
    print_line("", fmt, ap);
    va_end(ap);
}

double moec_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 12345678 -> "12.3M" */
static const char *short_count(char *buf, size_t cap, double v)
{
    static const char prefix[] = " kMGTP";
    size_t i = 0;
    for (; v >= 999.5 && i + 2 < sizeof prefix; i++)
        v /= 1000.0;
    snprintf(buf, cap, v < 9.995 && i > 0 ? "%.2f%.1s" : v < 99.95 && i > 0 ? "%.1f%.1s" : "%.0f%.1s", v,
             i > 0 ? &prefix[i] : "");
    return buf;
}

static const char *duration(char *buf, size_t cap, double s)
{
    long t = (long)(s + 0.5);
    if (t >= 3600)
        snprintf(buf, cap, "%ldh%02ldm", t / 3600, t / 60 % 60);
    else
        snprintf(buf, cap, "%ldm%02lds", t / 60, t % 60);
    return buf;
}

static void show(moec_progress *p, double now, bool last)
{
    uint64_t so_far = __atomic_load_n(&p->done, __ATOMIC_RELAXED); /* others go on stepping */
    double spent = now - p->started, rate = spent > 1e-6 ? (double)(so_far - p->skipped) / spent : 0.0;
    double share = p->total ? (double)so_far / (double)p->total : 1.0;
    char done[32], total[32], speed[32], time[32], bar[25];
    short_count(done, sizeof done, (double)so_far);
    short_count(total, sizeof total, (double)p->total);
    short_count(speed, sizeof speed, rate);
    duration(time, sizeof time, last || rate <= 0 ? spent : (double)(p->total - so_far) / rate);
    const char *word = last ? "took" : rate > 0 ? "left" : "so far";
    if (isatty(STDERR_FILENO)) {
        int full = (int)(share * 24.0);
        for (int i = 0; i < 24; i++)
            bar[i] = i < full ? '#' : '.';
        bar[24] = '\0';
        fprintf(stderr, "\r\033[K%-14s [%s] %3.0f%% %s/%s %s  %s/s  %s %s%s", p->what, bar, share * 100.0, done, total,
                p->unit, speed, time, word, last ? "\n" : "");
        bar_shown = !last;
    } else {
        fprintf(stderr, "%s: %3.0f%% %s/%s %s, %s/s, %s %s\n", p->what, share * 100.0, done, total, p->unit, speed,
                time, word);
    }
    p->shown = now;
}

void moec_progress_start(moec_progress *p, const char *what, const char *unit, uint64_t total, uint64_t skipped)
{
    double now = moec_now();
    *p = (moec_progress){.what = what, .unit = unit, .total = total, .done = skipped, .skipped = skipped};
    p->started = p->shown = now;
    p->on = level >= MOEC_NORMAL;
    if (p->on && isatty(STDERR_FILENO))
        show(p, now, false);
}

void moec_progress_step(moec_progress *p, uint64_t n)
{
    uint64_t done = __atomic_add_fetch(&p->done, n, __ATOMIC_RELAXED);
    if (!p->on || done >= p->total)
        return;
    static volatile char busy; /* one thread looks and draws; the others do not wait for it */
    if (__atomic_test_and_set(&busy, __ATOMIC_ACQUIRE))
        return;
    double now = moec_now();
    if (now - p->shown >= (isatty(STDERR_FILENO) ? 0.2 : 10.0))
        show(p, now, false);
    __atomic_clear(&busy, __ATOMIC_RELEASE);
}

void moec_progress_finish(moec_progress *p)
{
    double now = moec_now();
    if (p->on && (isatty(STDERR_FILENO) || now - p->started >= 1.0)) /* in a log, short work needs no line */
        show(p, now, true);
    p->on = false;
}

void moec_progress_stop(moec_progress *p)
{
    if (p->on && bar_shown)
        fputs("\r\033[K", stderr);
    bar_shown = bar_shown && !p->on;
    p->on = false;
}

static void on_signal(int sig)
{
    interrupted = 1;
    signal(sig, SIG_DFL); /* the second one means it */
}

void moec_catch_signals(void)
{
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = on_signal;
    sigemptyset(&a.sa_mask);
    sigaction(SIGINT, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
}

moec_status moec_interrupted(moec_err *err)
{
    return interrupted ? moec_fail(err, MOEC_EINTR, "interrupted") : MOEC_OK;
}
