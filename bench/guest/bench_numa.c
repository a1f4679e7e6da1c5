// SPDX-License-Identifier: GPL-2.0
/*
 * What NUMA balancing costs those whose memory it moves: a hint fault that migrates,
 * or queues; a batch of the thread that migrates what is queued, which is the longest
 * that a task may wait for one of its pages; and how long it takes until memory is
 * where it is used.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

#define PROG	"bench_numa"
#define SCAN	"/sys/kernel/debug/sched/numa_balancing/"
#define LIMITS	"/sys/kernel/mm/kmigrated/"
#define SWITCH	"/proc/sys/kernel/numa_balancing_async"
#define TRACE	"/sys/kernel/tracing/"
#define EVENT	TRACE "events/migrate/numa_async_batch/enable"
#define MAX_THREADS 64
#define GIVE_UP	(120ULL * 1000000000)

enum how { FAULT, BATCH, CONVERGE };

static const char * const how_names[] = { "fault", "batch", "converge" };

static enum how how;
static unsigned long nr_pages = 192, batch = 64, rounds = 5, pairs = 10, threads = 1;
static bool has_async;

static char *mem;
static int near_cpu[MAX_THREADS], far_cpu;	/* of node 1, and of node 0 */
static int nr_near;
static atomic_bool stop;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_numa [option...]\n"
"  --how fault         what a hint fault takes that migrates, or queues (default)\n"
"        batch         what a batch takes, for each folio\n"
"        converge      time until 95 %% of the memory are on node 1, where it is used\n"
"  --pages N           (192)\n"
"  --batch N           batch_size (64)\n"
"  --rounds N          fault, batch: how often (5)\n"
"  --pairs N           converge: how often, off and on in turn (10)\n"
"  --threads N         converge: how many use the memory, each its own part (1)\n"
"Without kernel.numa_balancing_async, only what tasks migrate is measured.\n");
	exit(EXIT_UNABLE);
}

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "how", required_argument, NULL, 'h' },
		{ "pages", required_argument, NULL, 'n' },
		{ "batch", required_argument, NULL, 'b' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "pairs", required_argument, NULL, 'p' },
		{ "threads", required_argument, NULL, 't' },
		{ }
	};
	size_t i;
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 'h':
			for (i = 0; i < ARRAY_SIZE(how_names); i++)
				if (!strcmp(optarg, how_names[i]))
					break;
			if (i == ARRAY_SIZE(how_names))
				usage();
			how = i;
			break;
		case 'n': nr_pages = parse_ulong("--pages", optarg); break;
		case 'b': batch = parse_ulong("--batch", optarg); break;
		case 'r': rounds = parse_ulong("--rounds", optarg); break;
		case 'p': pairs = parse_ulong("--pairs", optarg); break;
		case 't': threads = parse_ulong("--threads", optarg); break;
		default: usage();
		}
	}
	if (optind != argc || !nr_pages || !threads || threads > MAX_THREADS)
		usage();
}

static void set(const char *path, unsigned long value)
{
	char text[32];

	snprintf(text, sizeof(text), "%lu", value);
	require_file(path, text);
}

/* --- where things are ------------------------------------------------------------ */

/* CPUs of a node with its lists as the lab's guests have them: "2-3" */
static int cpus_of(int node, int *cpus)
{
	char path[64];
	int first, last, n = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/cpulist", node);
	f = fopen(path, "re");
	if (!f || (n = fscanf(f, "%d-%d", &first, &last)) < 1)
		die("node %d has no CPUs", node);
	fclose(f);
	if (n == 1)
		last = first;
	for (n = 0; first <= last && n < MAX_THREADS; first++)
		cpus[n++] = first;
	return n;
}

#define ANY	(-1)

static void bind_memory(int node)
{
	unsigned long mask = 1UL << node;

	if (syscall(SYS_set_mempolicy, node == ANY ? MPOL_DEFAULT : MPOL_BIND,
		    node == ANY ? NULL : &mask, node == ANY ? 0 : 64))
		die("set_mempolicy: %s", strerror(errno));
}

/* New memory each time, so that NUMA balancing knows nothing of it. */
static void make_memory(void)
{
	size_t i;

	if (mem)
		munmap(mem, nr_pages * BASE_PAGE);
	bind_memory(0);
	mem = mmap(NULL, nr_pages * BASE_PAGE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED || madvise(mem, nr_pages * BASE_PAGE, MADV_NOHUGEPAGE))
		die("no memory: %s", strerror(errno));
	for (i = 0; i < nr_pages; i++)
		*(uint64_t *)(mem + i * BASE_PAGE) = i;
	bind_memory(ANY);
	/* What is about to be put on the LRU cannot be isolated */
	drain_lru();
}

static size_t nr_on(int node)
{
	void **pages = xcalloc(nr_pages, sizeof(*pages));
	int *status = xcalloc(nr_pages, sizeof(*status));
	size_t i, n = 0;

	for (i = 0; i < nr_pages; i++)
		pages[i] = mem + i * BASE_PAGE;
	if (syscall(SYS_move_pages, 0, nr_pages, pages, NULL, status, 0))
		die("move_pages: %s", strerror(errno));
	for (i = 0; i < nr_pages; i++)
		n += status[i] == node;
	free(pages);
	free(status);
	return n;
}

static uint64_t touch(size_t page)
{
	return *(volatile uint64_t *)(mem + page * BASE_PAGE);
}

/* Events only: these need no stat_refresh, which would disturb all CPUs. */
static long vmstat(const char *name)
{
	char key[64];
	long value, found = 0;
	FILE *f = fopen("/proc/vmstat", "re");

	while (f && fscanf(f, "%63s %ld", key, &value) == 2)
		if (!strcmp(key, name))
			found = value;
	if (f)
		fclose(f);
	return found;
}

/* --- NUMA balancing ---------------------------------------------------------------- */

static void scan(unsigned long on)
{
	set("/proc/sys/kernel/numa_balancing", on);
}

static void set_up(void)
{
	nr_near = cpus_of(1, near_cpu);
	cpus_of(0, &far_cpu);
	set(SCAN "scan_delay_ms", 1);
	set(SCAN "scan_period_min_ms", 20);
	set(SCAN "scan_period_max_ms", 20);
	set(SCAN "scan_size_mb", 256);
	has_async = !access(SWITCH, W_OK);
}

static void set_async(bool on)
{
	if (has_async)
		set(SWITCH, on);
}

/* Nothing is migrated before it is wanted; a CPU queues from the first one on. */
static void hold_all(unsigned long size)
{
	set(LIMITS "hold_ms", 1000);
	set(LIMITS "ttl_ms", 60000);
	set(LIMITS "smallest_batch", 1);
	set(LIMITS "batch_size", size);
	/* As many as fit: what is measured is not a full ring */
	set(LIMITS "ring_size", 256);
}

static void wait_until_done(void)
{
	const struct timespec ms = { 0, 1000000 };

	while (has_async && read_long(LIMITS "waiting") > 0)
		nanosleep(&ms, NULL);
}

/* --- times ---------------------------------------------------------------------------- */

static int compare(const void *a, const void *b)
{
	const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static uint64_t at(uint64_t *sorted, size_t nr, unsigned int percent)
{
	return nr ? sorted[(nr - 1) * percent / 100] : 0;
}

static void print_times(uint64_t *times, size_t nr)
{
	qsort(times, nr, sizeof(*times), compare);
	json_int("nr", nr);
	json_int("p50", at(times, nr, 50));
	json_int("p90", at(times, nr, 90));
	json_int("p99", at(times, nr, 99));
	json_int("max", at(times, nr, 100));
}

/* A hint fault takes longer than this, nothing else does but an interrupt. */
#define NO_FAULT	400

/* The TSC counts instructions with -icount; the clock may be a system call there. */
static uint64_t timed_touch(size_t page)
{
	const uint64_t begun = __builtin_ia32_rdtsc();

	touch(page);
	return __builtin_ia32_rdtsc() - begun;
}

/* Touches everything until all of it has had a hint fault; how long these took. */
static size_t fault_all(uint64_t *times, size_t first, size_t nr, int cpu)
{
	const uint64_t begun = now_ns();
	size_t found = 0, i;
	bool *had = xcalloc(nr, sizeof(*had));

	pin_to_cpu(cpu);
	while (found < nr) {
		for (i = 0; i < nr; i++) {
			const uint64_t t = timed_touch(first + i);

			if (t > NO_FAULT && !had[i]) {
				had[i] = true;
				if (times)
					times[found] = t;
				found++;
			}
		}
		if (now_ns() - begun > GIVE_UP)
			break;
	}
	free(had);
	return found;
}

static uint64_t without_fault(void)
{
	uint64_t t[101];
	size_t i;

	for (i = 0; i < ARRAY_SIZE(t); i++)
		t[i] = timed_touch(0);
	qsort(t, ARRAY_SIZE(t), sizeof(*t), compare);
	return t[ARRAY_SIZE(t) / 2];
}

/* --- what is measured ------------------------------------------------------------------- */

static void measure_faults(bool on)
{
	uint64_t *times = xcalloc(nr_pages * rounds, sizeof(*times));
	const long hints = vmstat("numa_hint_faults");
	long queued, migrated;
	size_t nr = 0, i;

	set_async(on);
	if (on)
		hold_all(512);
	queued = vmstat("numa_async_queued");
	migrated = vmstat("numa_pages_migrated");
	for (i = 0; i < rounds; i++) {
		make_memory();
		scan(1);
		nr += fault_all(times + nr, 0, nr_pages, near_cpu[0]);
		scan(0);
		wait_until_done();
	}
	json_begin(PROG);
	json_str("how", "fault");
	json_bool("on", on);
	json_int("without_fault", without_fault());
	json_int("hint_faults", vmstat("numa_hint_faults") - hints);
	json_int("queued", on ? vmstat("numa_async_queued") - queued : 0);
	json_int("migrated", vmstat("numa_pages_migrated") - migrated);
	print_times(times, nr);
	json_end();
	free(times);
	set_async(false);
}

/* How long the last batches took, and how many folios they had. */
static void print_batches(void)
{
	unsigned int hints, folios, pages, migrated;
	unsigned long long ns;
	char line[512], *found;
	FILE *f = fopen(TRACE "trace", "re");

	while (f && fgets(line, sizeof(line), f)) {
		found = strstr(line, "nr_hints=");
		if (!found || sscanf(found, "nr_hints=%u nr_folios=%u nr_pages=%u "
				     "nr_migrated=%u time_ns=%llu",
				     &hints, &folios, &pages, &migrated, &ns) != 5)
			continue;
		json_begin(PROG);
		json_str("how", "batch");
		json_int("batch", batch);
		json_int("folios", folios);
		json_int("migrated", migrated);
		json_int("ns", ns);
		json_end();
	}
	if (f)
		fclose(f);
}

static void measure_batches(void)
{
	const size_t cpus = batch > 256 ? 2 : 1;
	size_t i, cpu;

	nr_pages = batch;
	if (!has_async)
		return;
	set_async(true);
	hold_all(batch);
	set(EVENT, 1);
	for (i = 0; i < rounds; i++) {
		make_memory();
		scan(1);
		for (cpu = 0; cpu < cpus; cpu++)
			fault_all(NULL, cpu * nr_pages / cpus, nr_pages / cpus,
				  near_cpu[cpu % nr_near]);
		scan(0);
		wait_until_done();
	}
	set(EVENT, 0);
	print_batches();
	set_async(false);
}

static void *use_part(void *arg)
{
	const size_t part = (size_t)arg, size = nr_pages / threads;
	size_t i;

	pin_to_cpu(near_cpu[part % nr_near]);
	while (!atomic_load(&stop))
		for (i = part * size; i < (part + 1) * size; i++)
			touch(i);
	return NULL;
}

static uint64_t time_to_local(void)
{
	const struct timespec ms = { 0, 4000000 };
	pthread_t thread[MAX_THREADS];
	const long before = vmstat("numa_pages_migrated");
	uint64_t begun;
	size_t i;

	make_memory();
	atomic_store(&stop, false);
	begun = now_ns();
	scan(1);
	for (i = 0; i < threads; i++)
		if (pthread_create(&thread[i], NULL, use_part, (void *)i))
			die("no thread");
	pin_to_cpu(far_cpu);
	while (vmstat("numa_pages_migrated") - before < (long)(nr_pages * 95 / 100) &&
	       now_ns() - begun < GIVE_UP)
		nanosleep(&ms, NULL);
	begun = now_ns() - begun;
	atomic_store(&stop, true);
	for (i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
	scan(0);
	wait_until_done();
	if (nr_on(1) < nr_pages * 90 / 100)
		die("%zu of %lu pages are on node 1", nr_on(1), nr_pages);
	return begun;
}

static const char * const counters[] = {
	"numa_pages_migrated", "numa_async_queued", "numa_async_migrated", "numa_async_batches",
	"numa_async_stale", "numa_async_expired", "numa_async_failed",
	"numa_async_not_isolated", "numa_async_sync_full", "numa_async_sync_small",
	"numa_async_sync_lagging", "numa_hint_faults", "numa_pte_updates",
};

static void converge(bool on)
{
	struct stats a, b;
	uint64_t ns;
	size_t i;

	set_async(on);
	vmstat_read(&a);
	ns = time_to_local();
	vmstat_read(&b);
	json_begin(PROG);
	json_str("how", "converge");
	json_bool("on", on);
	json_int("threads", threads);
	json_int("pages", nr_pages);
	json_int("ns", ns);
	for (i = 0; i < ARRAY_SIZE(counters); i++)
		json_int(counters[i], stat_delta(&a, &b, counters[i]));
	json_end();
	set_async(false);
}

static void measure_convergence(void)
{
	unsigned long i;

	for (i = 0; i <= pairs; i++) {
		/* The first one warms up */
		converge(false);
		if (has_async)
			converge(true);
	}
}

int main(int argc, char **argv)
{
	bench_init(PROG);
	parse(argc, argv);
	set_up();
	scan(0);
	pin_to_cpu(near_cpu[0]);
	switch (how) {
	case FAULT:
		measure_faults(false);
		if (has_async)
			measure_faults(true);
		break;
	case BATCH:
		measure_batches();
		break;
	case CONVERGE:
		measure_convergence();
		break;
	}
	return 0;
}
