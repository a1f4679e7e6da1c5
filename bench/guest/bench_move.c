// SPDX-License-Identifier: GPL-2.0
/*
 * Moves memory made of folios of one size between two nodes and says what it
 * took, with the way TLB flushes are done fixed and checked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

#define PROG	"bench_move"

static struct region mem = { .kind = MEM_ANON, .folio_kb = 4 };
static unsigned long size_mb = 32, rounds = 5;
static enum flush_mode mode = FLUSH_DEFERRED;
static bool use_move_pages, spin, fresh, trace_flushes;
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
"  --trace-flushes     one more round, not counted, with the calls of TLB flushes\n"
"                      traced\n"
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
		{ "trace-flushes", no_argument, NULL, 't' },
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
		case 't': trace_flushes = true; break;
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

static void print_head(void)
{
	json_begin(PROG);
	json_str("kind", mem.kind == MEM_ANON ? "anon" : "shmem");
	json_int("folio_kb", mem.folio_kb);
	json_str("op", use_move_pages ? "move_pages" : "mbind");
	json_str("mode", mode == FLUSH_LOCAL ? "local" : "deferred");
	json_bool("spin", spin);
	json_bool("fresh", fresh);
}

static void round_print(const struct round *r)
{
	print_head();
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

static int move(int to)
{
	return use_move_pages ? move_folios(&mem, to) : mbind_move(&mem, to);
}

static void round_measure(struct round *r)
{
	flush_mode_turn();
	vmstat_read(&r->vm[0]);
	mthp_read(&r->mthp[0], mem.folio_kb);
	r->interval = mark_start();
	r->ns = now_ns();
	r->ret = move(r->to);
	r->ns = now_ns() - r->ns;
	mark_end();
	vmstat_read(&r->vm[1]);
	mthp_read(&r->mthp[1], mem.folio_kb);
}

/* Returns the node to move to. */
static int prepare(unsigned long nr)
{
	if (fresh && nr) {
		region_unmap(&mem);
		region_make(&mem, 0);
	}
	region_fill(&mem, nr + 1);
	return fresh ? 1 : (nr + 1) % 2;
}

static bool one_round(unsigned long nr)
{
	/* PMD-mapped folios are flushed one by one, whatever the mode. */
	long ptes = mem.folio_kb == PMD_KB ? 0 : mem.bytes / BASE_PAGE;
	static struct round r;

	r.nr = nr;
	r.to = prepare(nr);
	round_measure(&r);
	r.there = region_pages_on(&mem, r.to);
	r.intact = region_intact_folios(&mem);
	r.bad = region_bad_words(&mem);
	r.flush_error = flush_mode_error(&r.vm[0], &r.vm[1], ptes);
	round_print(&r);
	if (r.flush_error)
		progress("round %lu: %s", nr, r.flush_error);
	return round_ok(&r);
}

/* No "interval": what traces cannot be counted. */
static bool traced_round(unsigned long nr)
{
	int to = prepare(nr), ret;
	unsigned long bad, there;
	long calls;

	flush_mode_turn();
	flush_trace_start();
	ret = move(to);
	calls = flush_trace_end();
	there = region_pages_on(&mem, to);
	bad = region_bad_words(&mem);
	print_head();
	json_bool("uncounted", true);
	json_int("ret", ret);
	json_int("pages", mem.bytes / BASE_PAGE);
	json_int("folios", region_folios(&mem));
	json_int("pages_there", there);
	json_int("bad_words", bad);
	json_int("tlb_flush_calls", calls);
	json_bool("ok", !ret && !bad && there == mem.bytes / BASE_PAGE);
	json_end();
	return !ret && !bad && there == mem.bytes / BASE_PAGE;
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
	flush_mode_start(mode, cpu, spin);
	for (nr = 0; nr < rounds; nr++)
		ok &= one_round(nr);
	if (trace_flushes)
		ok &= traced_round(nr);
	return ok ? 0 : EXIT_WRONG;
}
