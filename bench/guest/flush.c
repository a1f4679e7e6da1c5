// SPDX-License-Identifier: GPL-2.0
/* How TLB flushes are done, made certain; and how many there were. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"

#define TRACEFS		"/sys/kernel/tracing/"

static enum flush_mode mode;
static bool spin;

/*
 * The helper makes this mm one that runs on two CPUs. Before each round it
 * is woken, loads the mm on its CPU and, unless it is to spin, sleeps again:
 * its CPU stays in the mm's mask, but adds no instructions.
 */
static atomic_uint turn, answered;

static void futex_wait(atomic_uint *word, unsigned int val)
{
	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, val, NULL, NULL, 0);
}

static void futex_wake(atomic_uint *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void *helper_main(void *arg)
{
	unsigned int seen = 0, now;

	pin_to_cpu(*(int *)arg);
	for (;;) {
		while ((now = atomic_load(&turn)) == seen) {
			if (!spin)
				futex_wait(&turn, seen);
			__builtin_ia32_pause();
		}
		seen = now;
		atomic_store(&answered, now);
		futex_wake(&answered);
	}
	return NULL;
}

/* Once, on @cpu, to which the caller is pinned since its mm exists. */
void flush_mode_start(enum flush_mode wanted, int cpu, bool helper_spins)
{
	static int helper_cpu;
	pthread_t thread;
	int ret;

	mode = wanted;
	spin = helper_spins;
	if (mode == FLUSH_LOCAL)
		return;
	helper_cpu = other_online_cpu(cpu);
	ret = pthread_create(&thread, NULL, helper_main, &helper_cpu);
	if (ret)
		die("cannot start the second thread: %s", strerror(ret));
}

/* Before each round. */
void flush_mode_turn(void)
{
	unsigned int now;

	if (mode == FLUSH_LOCAL)
		return;
	now = atomic_fetch_add(&turn, 1) + 1;
	futex_wake(&turn);
	while (atomic_load(&answered) != now)
		futex_wait(&answered, now - 1);
	/* It must be asleep again, or its last steps would be counted. */
	if (!spin)
		usleep(5000);
}

/*
 * Local: nothing was sent to another CPU. Deferred: something was, and far
 * fewer flushes than page-table entries (@ptes is 0 where that cannot be asked
 * for: flushes for PMD-mapped folios are never deferred).
 */
const char *flush_mode_error(const struct stats *a, const struct stats *b,
			     long ptes)
{
	long remote = stat_delta(a, b, "nr_tlb_remote_flush");
	long local = stat_delta(a, b, "nr_tlb_local_flush_one") +
		     stat_delta(a, b, "nr_tlb_local_flush_all");
	long flushes = remote > local ? remote : local;

	if (stat_get(b, "nr_tlb_remote_flush") < 0)
		return "the kernel has no nr_tlb_* counters (CONFIG_DEBUG_TLBFLUSH)";
	if (mode == FLUSH_LOCAL && remote)
		return "mode local was asked for, but flushes were sent to other CPUs";
	if (mode == FLUSH_DEFERRED && !remote)
		return "mode deferred was asked for, but no flush was sent to another CPU";
	if (mode == FLUSH_DEFERRED && ptes && flushes * 2 > ptes)
		return "mode deferred was asked for, but flushes were not batched";
	return NULL;
}

/*
 * The nr_tlb_* counters count what a flush invalidates, page by page; the
 * event tlb:tlb_flush comes once a call. Tracing has its price: never in a
 * counted interval.
 */
void flush_trace_start(void)
{
	char pid[32];

	snprintf(pid, sizeof(pid), "%d", getpid());
	require_file(TRACEFS "set_event_pid", pid);
	require_file(TRACEFS "buffer_size_kb", "8192");
	require_file(TRACEFS "trace", "0");
	require_file(TRACEFS "tracing_on", "1");
	require_file(TRACEFS "events/tlb/tlb_flush/enable", "1");
}

/* Flushes this task called for since the start; not those of a task switch. */
long flush_trace_end(void)
{
	unsigned long kept, written;
	char line[512];
	long calls = 0;
	FILE *f;

	require_file(TRACEFS "events/tlb/tlb_flush/enable", "0");
	f = fopen(TRACEFS "trace", "re");
	if (!f)
		die(TRACEFS "trace: %s", strerror(errno));
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "# entries-in-buffer/entries-written: %lu/%lu",
			   &kept, &written) == 2 && kept != written)
			die("the trace buffer kept %lu of %lu events", kept,
			    written);
		calls += *line != '#' && strstr(line, "tlb_flush:") &&
			 !strstr(line, "task switch");
	}
	fclose(f);
	return calls;
}
