/* SPDX-License-Identifier: GPL-2.0 */
/* What the tests of NUMA balancing in the background have in common. */
#ifndef __NUMA_ASYNC_H__
#define __NUMA_ASYNC_H__

#include <poll.h>
#include <sched.h>
#include <time.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include "migrate_util.h"

#define SWITCH		"/proc/sys/kernel/numa_balancing_async"
#define LIMITS		"/sys/kernel/mm/kmigrated/"
#define DEBUG		"/sys/kernel/debug/kmigrated/"
#define SCAN		"/sys/kernel/debug/sched/numa_balancing/"
#define NR_WORDS	(psize() / sizeof(uint64_t))
/* That is what anything takes at most: tests may take 120 */
#define SECONDS		40

static inline bool put_str(const char *path, const char *value)
{
	const int fd = open(path, O_WRONLY | O_CLOEXEC);
	const bool good = fd >= 0 && write(fd, value, strlen(value)) > 0;

	if (fd >= 0)
		close(fd);
	return good;
}

static inline bool put(const char *path, long value)
{
	char buf[32];

	snprintf(buf, sizeof(buf), "%ld", value);
	return put_str(path, buf);
}

static inline long get(const char *path)
{
	char buf[32] = "", *end;
	long value;

	if (read_file(path, buf, sizeof(buf)) <= 0)
		return -1;
	value = strtol(buf, &end, 10);
	return end == buf ? -1 : value;
}

static inline long event(const char *name)
{
	return read_named("/proc/vmstat", name);
}

static inline double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* --- nodes ------------------------------------------------------------------- */

/* The first CPU of a node, -1 if it has none. */
static inline int cpu_of(int node)
{
	char path[64];

	snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/cpulist", node);
	return get(path);
}

static inline bool run_on_cpu(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	return !sched_setaffinity(0, sizeof(set), &set);
}

static inline bool run_on(int node)
{
	return run_on_cpu(cpu_of(node));
}

static inline size_t nr_on(char *mem, size_t nr, int node)
{
	void **pages = calloc(nr, sizeof(*pages));
	int *status = calloc(nr, sizeof(*status));
	size_t found = 0, i;

	for (i = 0; i < nr; i++)
		pages[i] = mem + i * psize();
	if (!syscall(__NR_move_pages, 0, nr, pages, NULL, status, 0))
		for (i = 0; i < nr; i++)
			found += status[i] == node;
	free(pages);
	free(status);
	return found;
}

/* --- memory -------------------------------------------------------------------- */

static inline uint64_t pattern(size_t page, size_t word)
{
	return (page << 16 | word) * 0x9e3779b97f4a7c15ULL + 1;
}

static inline void fill(char *mem, size_t nr)
{
	for (size_t page = 0; page < nr; page++)
		for (size_t word = 0; word < NR_WORDS; word++)
			((uint64_t *)mem)[page * NR_WORDS + word] = pattern(page, word);
}

static inline size_t wrong_pages(const char *mem, size_t nr)
{
	size_t wrong = 0, page, word;

	for (page = 0; page < nr; page++) {
		for (word = 0; word < NR_WORDS; word++)
			if (((uint64_t *)mem)[page * NR_WORDS + word] != pattern(page, word))
				break;
		wrong += word < NR_WORDS;
	}
	return wrong;
}

static inline void touch(const char *mem, size_t nr)
{
	for (size_t page = 0; page < nr; page++)
		FORCE_READ(mem[page * psize()]);
}

/*
 * What is about to be put on the LRU cannot be isolated. move_pages() has all CPUs do
 * that first; this page is there already.
 */
static inline int drain_lru(int node)
{
	void *page = mmap(NULL, psize(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			  -1, 0);
	int status = -1;

	*(char *)page = 1;
	return syscall(__NR_move_pages, 0, 1, &page, &node, &status, MPOL_MF_MOVE);
}

/* Memory that is on one node, without a policy, for a task that is on the other one. */
static inline char *memory_on(int node, int other, size_t nr, int fd)
{
	char *mem;

	run_on(node);
	mem = mmap(NULL, nr * psize(), PROT_READ | PROT_WRITE,
		   fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
	if (mem == MAP_FAILED)
		return NULL;
	if (fd < 0)
		madvise(mem, nr * psize(), MADV_NOHUGEPAGE);
	fill(mem, nr);
	run_on(other);
	drain_lru(other);
	return mem;
}

/* --- kmigrated ------------------------------------------------------------------- */

static const struct {
	const char *path;
	long value;
} knobs[] = {
	{ "/proc/sys/kernel/numa_balancing", 1 },
	{ SCAN "scan_delay_ms", 1 },
	{ SCAN "scan_period_min_ms", 20 },
	{ SCAN "scan_period_max_ms", 100 },
	{ SCAN "scan_size_mb", 256 },
	{ LIMITS "batch_size", 64 },
	{ LIMITS "smallest_batch", 1 },
	{ LIMITS "hold_ms", 4 },
	/* Nothing expires by itself, however slow the machine is */
	{ LIMITS "ttl_ms", 60000 },
	{ LIMITS "ring_size", 256 },
	{ SWITCH, 1 },
};

static inline bool pause_it(bool on)
{
	return put(DEBUG "paused", on);
}

/* What a test before this one may have left, if it was killed. */
static inline void let_go(void)
{
	if (access(DEBUG "paused", W_OK))
		return;
	put(DEBUG "flight_ms", 0);
	pause_it(false);
}

/* Until nothing is waiting, nor being migrated. */
static inline bool settle(void)
{
	const double end = now() + SECONDS;

	while (get(LIMITS "waiting") > 0) {
		if (now() > end)
			return false;
		poll(NULL, 0, 1);
	}
	return true;
}

static inline bool resume(void)
{
	return pause_it(false) && settle();
}

/* Uses memory until @want more hints have been queued. */
static inline bool queue(const char *mem, size_t nr, long want)
{
	const long queued = event("numa_async_queued");
	const double end = now() + SECONDS;

	while (event("numa_async_queued") - queued < want) {
		if (now() > end)
			return false;
		touch(mem, nr);
	}
	return true;
}

/* Uses memory until most of it is on the node. */
static inline bool converge(char *mem, size_t nr, int node)
{
	const double end = now() + SECONDS;

	while (nr_on(mem, nr, node) * 100 < nr * 95) {
		if (now() > end) {
			ksft_print_msg("%zu of %zu pages, %ld hint faults, %ld queued\n",
				       nr_on(mem, nr, node), nr, event("numa_hint_faults"),
				       event("numa_async_queued"));
			return false;
		}
		for (int i = 0; i < 20; i++)
			touch(mem, nr);
	}
	return true;
}

static inline long done_with(void)
{
	return event("numa_async_migrated") + event("numa_async_failed") +
	       event("numa_async_stale") + event("numa_async_expired") +
	       event("numa_async_not_isolated");
}

/* Those that were isolated before a test are somebody else's. */
static inline long nr_isolated(void)
{
	put("/proc/sys/vm/stat_refresh", 1);
	return event("nr_isolated_anon") + event("nr_isolated_file");
}

static inline bool nothing_more_is_isolated(long before)
{
	const double end = now() + 5;

	while (nr_isolated() > before) {
		if (now() > end)
			return false;
		poll(NULL, 0, 10);
	}
	return true;
}

struct balancing {
	int node[2];
	long was[ARRAY_SIZE(knobs)];
	long isolated;
	bool on;
};

/* @debug: with hints that can be kept waiting; @cpus: on two nodes with CPUs */
static inline const char *start_on(struct balancing *self, bool debug, bool cpus)
{
	if (access(SWITCH, W_OK))
		return "needs CONFIG_NUMA_BALANCING_ASYNC and root";
	if (!two_nodes(self->node) ||
	    (cpus && (cpu_of(self->node[0]) < 0 || cpu_of(self->node[1]) < 0)))
		return "needs two nodes with memory and CPUs";
	if (access(SCAN "scan_delay_ms", W_OK))
		return "needs debugfs in /sys/kernel/debug";
	if (debug && access(DEBUG "paused", W_OK))
		return "needs CONFIG_NUMA_BALANCING_ASYNC_DEBUG";
	self->isolated = nr_isolated();
	for (size_t i = 0; i < ARRAY_SIZE(knobs); i++)
		self->was[i] = get(knobs[i].path);
	self->on = true;
	let_go();
	for (size_t i = 0; i < ARRAY_SIZE(knobs); i++)
		if (!put(knobs[i].path, knobs[i].value))
			ksft_exit_fail_msg("cannot write %ld to %s\n", knobs[i].value,
					   knobs[i].path);
	return NULL;
}

static inline const char *start(struct balancing *self, bool debug)
{
	return start_on(self, debug, true);
}

/*
 * Switched off, so that there are no hints left: true if all have been counted, and
 * nothing has stayed isolated.
 */
static inline bool stop(struct balancing *self)
{
	bool good;

	if (!self->on)
		return true;
	self->on = false;
	let_go();
	put(SWITCH, 0);
	good = done_with() == event("numa_async_queued") && !get(LIMITS "waiting");
	if (!good)
		ksft_print_msg("%ld queued, %ld done with, %ld waiting\n",
			       event("numa_async_queued"), done_with(), get(LIMITS "waiting"));
	for (size_t i = ARRAY_SIZE(knobs); i--;)
		put(knobs[i].path, self->was[i]);
	return nothing_more_is_isolated(self->isolated) && good;
}

#endif /* __NUMA_ASYNC_H__ */
