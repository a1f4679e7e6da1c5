// SPDX-License-Identifier: GPL-2.0
/*
 * Moves memory made of folios of one size between two nodes and says what it
 * took, with the way TLB flushes are done fixed and checked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"

#define PROG	"bench_move"

enum flush_mode { FLUSH_LOCAL, FLUSH_DEFERRED };

static struct region mem = { .kind = MEM_ANON, .folio_kb = 4 };
static unsigned long size_mb = 32, rounds = 5;
static enum flush_mode mode = FLUSH_DEFERRED;
static bool use_move_pages, spin, fresh;
static int cpu;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_move [option...]\n"
"  --kind anon|shmem   (anon)\n"
"  --folio KB          4, 16, 32, 64 ... 2048 (4)\n"
"  --mb N              memory moved, MB (32)\n"
"  --rounds N          moves, node 0 -> 1 -> 0 ...; round 0 warms up (5)\n"
"  --fresh             new memory for each round, always node 0 -> 1: what one\n"
"                      round did to the folios is no concern of the next\n"
"  --op mbind|move_pages  (mbind)\n"
"  --mode local|deferred  one flush a page on the only CPU that ran this mm,\n"
"                      or one a batch because it ran on two (deferred)\n"
"  --spin              deferred: the other thread runs all the time, so that\n"
"                      flushes are sent to it (its instructions count as time)\n"
"  --cpu N             where the mover runs (0)\n");
	exit(EXIT_UNABLE);
}

static bool choice(const char *text, const char *no, const char *yes)
{
	if (strcmp(text, no) && strcmp(text, yes))
		usage();
	return !strcmp(text, yes);
}

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "kind", required_argument, NULL, 'k' },
		{ "folio", required_argument, NULL, 'f' },
		{ "mb", required_argument, NULL, 'm' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "op", required_argument, NULL, 'o' },
		{ "mode", required_argument, NULL, 'd' },
		{ "fresh", no_argument, NULL, 'n' },
		{ "spin", no_argument, NULL, 's' },
		{ "cpu", required_argument, NULL, 'c' },
		{ }
	};
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 'k':
			mem.kind = choice(optarg, "anon", "shmem") ?
				   MEM_SHMEM : MEM_ANON;
			break;
		case 'd':
			mode = choice(optarg, "local", "deferred") ?
			       FLUSH_DEFERRED : FLUSH_LOCAL;
			break;
		case 'o':
			use_move_pages = choice(optarg, "mbind", "move_pages");
			break;
		case 'f': mem.folio_kb = parse_ulong("--folio", optarg); break;
		case 'm': size_mb = parse_ulong("--mb", optarg); break;
		case 'r': rounds = parse_ulong("--rounds", optarg); break;
		case 'c': cpu = parse_ulong("--cpu", optarg); break;
		case 'n': fresh = true; break;
		case 's': spin = true; break;
		default: usage();
		}
	}
	mem.bytes = size_mb * MB;
	if (optind != argc || !rounds || mem.folio_kb < 4 ||
	    (mem.folio_kb & (mem.folio_kb - 1)) || mem.folio_kb > PMD_KB ||
	    !mem.bytes || mem.bytes % (mem.folio_kb * KB))
		usage();
	if (spin && mode == FLUSH_LOCAL)
		die("--spin needs --mode deferred");
}

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

static void helper_start(void)
{
	static int helper_cpu;
	pthread_t thread;
	int ret;

	if (mode == FLUSH_LOCAL)
		return;
	helper_cpu = other_online_cpu(cpu);
	ret = pthread_create(&thread, NULL, helper_main, &helper_cpu);
	if (ret)
		die("cannot start the second thread: %s", strerror(ret));
}

static void helper_turn(void)
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
 * fewer flushes than page-table entries (those of PMD-mapped folios are never
 * deferred, so there the second half cannot be asked for).
 */
static const char *flush_mode_error(const struct stats *a, const struct stats *b)
{
	long remote = stat_delta(a, b, "nr_tlb_remote_flush");
	long local = stat_delta(a, b, "nr_tlb_local_flush_one") +
		     stat_delta(a, b, "nr_tlb_local_flush_all");
	long ptes = mem.folio_kb == PMD_KB ? 0 : mem.bytes / BASE_PAGE;
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

struct round {
	unsigned long nr;
	int to, ret, interval;
	uint64_t ns;
	unsigned long there, intact, bad;
	struct stats vm[2], mthp[2];
	const char *flush_error;
};

static bool round_ok(const struct round *r)
{
	return !r->ret && !r->bad && !r->flush_error &&
	       r->there == mem.bytes / BASE_PAGE;
}

static void round_print(const struct round *r)
{
	json_begin(PROG);
	json_str("kind", mem.kind == MEM_ANON ? "anon" : "shmem");
	json_int("folio_kb", mem.folio_kb);
	json_str("op", use_move_pages ? "move_pages" : "mbind");
	json_str("mode", mode == FLUSH_LOCAL ? "local" : "deferred");
	json_bool("spin", spin);
	json_bool("fresh", fresh);
	json_int("interval", r->interval);
	json_int("round", r->nr);
	json_bool("warmup", !r->nr);
	json_int("to", r->to);
	json_int("ret", r->ret);
	json_int("ns", r->ns);
	json_int("pages", mem.bytes / BASE_PAGE);
	json_int("folios", region_folios(&mem));
	json_int("pages_there", r->there);
	json_int("folios_intact", r->intact);
	json_int("bad_words", r->bad);
	json_delta("vmstat", &r->vm[0], &r->vm[1]);
	json_delta("mthp", &r->mthp[0], &r->mthp[1]);
	if (r->flush_error)
		json_str("flush_error", r->flush_error);
	json_bool("ok", round_ok(r));
	json_end();
}

static void round_measure(struct round *r)
{
	helper_turn();
	vmstat_read(&r->vm[0]);
	mthp_read(&r->mthp[0], mem.folio_kb);
	r->interval = mark_start();
	r->ns = now_ns();
	r->ret = use_move_pages ? move_folios(&mem, r->to) :
				  mbind_move(&mem, r->to);
	r->ns = now_ns() - r->ns;
	mark_end();
	vmstat_read(&r->vm[1]);
	mthp_read(&r->mthp[1], mem.folio_kb);
}

static bool one_round(unsigned long nr)
{
	static struct round r;

	r.nr = nr;
	r.to = fresh ? 1 : (nr + 1) % 2;
	if (fresh && nr) {
		region_unmap(&mem);
		region_make(&mem, 0);
	}
	region_fill(&mem, nr + 1);
	round_measure(&r);
	r.there = region_pages_on(&mem, r.to);
	r.intact = region_intact_folios(&mem);
	r.bad = region_bad_words(&mem);
	r.flush_error = flush_mode_error(&r.vm[0], &r.vm[1]);
	round_print(&r);
	if (r.flush_error)
		progress("round %lu: %s", nr, r.flush_error);
	return round_ok(&r);
}

int main(int argc, char **argv)
{
	unsigned long nr;
	bool ok = true;

	bench_init(PROG);
	parse(argc, argv);
	pin_and_reexec(cpu, argv);
	if (nr_nodes() < 2)
		die("two NUMA nodes are needed, this guest has %d", nr_nodes());
	quiet_guest();
	region_make(&mem, 0);
	helper_start();
	for (nr = 0; nr < rounds; nr++)
		ok &= one_round(nr);
	return ok ? 0 : EXIT_WRONG;
}
