// SPDX-License-Identifier: GPL-2.0
/*
 * Do large folios stay what they are when they are migrated?
 *   survive: fully mapped anonymous folios are moved back and forth; none may
 *            be marked partially mapped, queued for splitting, or split.
 *   mlock:   the same, locked; the accounting of locked memory must not move.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "bench.h"

#define PROG	"bench_mthp_survive"

static unsigned long size_mb = 64, lock_mb = 32, folio_kb = 64, rounds = 4;
static bool use_move_pages, do_survive = true, do_mlock = true;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_mthp_survive [option...]\n"
"  --mb N        memory of the survive case, MB (64)\n"
"  --lock-mb N   memory of the mlock case, MB (32)\n"
"  --folio N     folio size, kB: 4, 16 ... 2048 (64)\n"
"  --rounds N    moves (4)\n"
"  --op mbind|move_pages  (mbind)\n"
"  --only survive|mlock\n");
	exit(EXIT_UNABLE);
}

static void parse_op(const char *op)
{
	if (strcmp(op, "mbind") && strcmp(op, "move_pages"))
		usage();
	use_move_pages = !strcmp(op, "move_pages");
}

static void parse_only(const char *what)
{
	do_survive = !strcmp(what, "survive");
	do_mlock = !strcmp(what, "mlock");
	if (!do_survive && !do_mlock)
		usage();
}

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "mb", required_argument, NULL, 'm' },
		{ "lock-mb", required_argument, NULL, 'l' },
		{ "folio", required_argument, NULL, 'f' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "op", required_argument, NULL, 'o' },
		{ "only", required_argument, NULL, 'n' },
		{ }
	};
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 'm': size_mb = parse_ulong("--mb", optarg); break;
		case 'l': lock_mb = parse_ulong("--lock-mb", optarg); break;
		case 'f': folio_kb = parse_ulong("--folio", optarg); break;
		case 'r': rounds = parse_ulong("--rounds", optarg); break;
		case 'o': parse_op(optarg); break;
		case 'n': parse_only(optarg); break;
		default: usage();
		}
	}
	if (optind != argc || !size_mb || !lock_mb || folio_kb < 4)
		usage();
}

static int move_to(const struct region *r, int node)
{
	return use_move_pages ? move_folios(r, node) : mbind_move(r, node);
}

/* A counter that this kernel lacks for this size (base pages) reads as -1. */
static void put_counter(const struct stats *st, const char *name)
{
	json_int(name, stat_get(st, name));
}

static void put_mthp(const struct stats *st)
{
	put_counter(st, "nr_anon");
	put_counter(st, "nr_anon_partially_mapped");
	put_counter(st, "split");
	put_counter(st, "split_deferred");
}

/* move -1 is the state before the first move. */
static bool survive_report(const struct region *r, int move, int ret,
			   const struct stats *first)
{
	unsigned long folios = region_folios(r), intact, there, bad;
	struct stats now;
	bool ok;

	mthp_read(&now, r->folio_kb);
	intact = region_intact_folios(r);
	there = region_pages_on(r, (move + 1) % 2);
	bad = region_bad_words(r);
	ok = !ret && !bad && intact == folios &&
	     there == r->bytes / BASE_PAGE &&
	     !stat_delta(first, &now, "split") &&
	     !stat_delta(first, &now, "split_deferred") &&
	     !stat_delta(first, &now, "nr_anon_partially_mapped");
	json_begin(PROG);
	json_str("case", "survive");
	json_int("folio_kb", r->folio_kb);
	json_int("move", move + 1);
	json_int("ret", ret);
	json_int("folios", folios);
	json_int("folios_intact", intact);
	put_mthp(&now);
	json_delta("mthp_delta", first, &now);
	json_int("pages_there", there);
	json_int("bad_words", bad);
	json_bool("ok", ok);
	json_end();
	return ok;
}

static bool survive(void)
{
	struct region r = {
		.kind = MEM_ANON,
		.folio_kb = folio_kb,
		.bytes = size_mb * MB,
	};
	struct stats first;
	bool ok;
	int i;

	region_make(&r, 0);
	mthp_read(&first, folio_kb);
	ok = survive_report(&r, -1, 0, &first);
	for (i = 0; i < (int)rounds; i++)
		ok &= survive_report(&r, i, move_to(&r, (i + 1) % 2), &first);
	region_unmap(&r);
	return ok;
}

struct locked {
	long nr_mlock;
	long nr_unevictable;
	long smaps_kb;
};

static void locked_read(const struct region *r, struct locked *l)
{
	struct stats st;

	drain_lru();
	vmstat_read(&st);
	l->nr_mlock = stat_get(&st, "nr_mlock");
	l->nr_unevictable = stat_get(&st, "nr_unevictable");
	l->smaps_kb = smaps_kb(r->addr, "Locked");
}

/*
 * @base is the state before mlock(). While locked all three show the whole
 * region; after munlock() they are back where they were.
 */
static bool mlock_report(const struct region *r, const char *when, int ret,
			 const struct locked *base, bool locked)
{
	long pages = locked ? r->bytes / BASE_PAGE : 0;
	struct locked now;
	unsigned long bad;
	bool ok;

	locked_read(r, &now);
	bad = region_bad_words(r);
	ok = !ret && !bad && now.nr_mlock - base->nr_mlock == pages &&
	     now.nr_unevictable - base->nr_unevictable == pages &&
	     now.smaps_kb == (long)(pages * BASE_PAGE / KB);
	json_begin(PROG);
	json_str("case", "mlock");
	json_int("folio_kb", r->folio_kb);
	json_str("when", when);
	json_int("ret", ret);
	json_int("pages_locked", pages);
	json_int("nr_mlock", now.nr_mlock - base->nr_mlock);
	json_int("nr_unevictable", now.nr_unevictable - base->nr_unevictable);
	json_int("smaps_locked_kb", now.smaps_kb);
	json_int("folios_intact", region_intact_folios(r));
	json_int("bad_words", bad);
	json_bool("ok", ok);
	json_end();
	return ok;
}

static bool mlocked(void)
{
	struct rlimit lim = { RLIM_INFINITY, RLIM_INFINITY };
	struct region r = {
		.kind = MEM_ANON,
		.folio_kb = folio_kb,
		.bytes = lock_mb * MB,
	};
	struct locked base;
	char when[32];
	bool ok;
	int i;

	setrlimit(RLIMIT_MEMLOCK, &lim);
	region_make(&r, 0);
	locked_read(&r, &base);
	if (mlock(r.addr, r.bytes))
		die("mlock of %lu MB: %s", lock_mb, strerror(errno));
	ok = mlock_report(&r, "locked", 0, &base, true);
	for (i = 0; i < (int)rounds; i++) {
		int ret = move_to(&r, (i + 1) % 2);

		snprintf(when, sizeof(when), "move %d", i + 1);
		ok &= mlock_report(&r, when, ret, &base, true);
	}
	if (munlock(r.addr, r.bytes))
		die("munlock: %s", strerror(errno));
	ok &= mlock_report(&r, "munlocked", 0, &base, false);
	region_unmap(&r);
	return ok;
}

int main(int argc, char **argv)
{
	bool ok = true;

	bench_init(PROG);
	parse(argc, argv);
	if (nr_nodes() < 2)
		die("two NUMA nodes are needed, this guest has %d", nr_nodes());
	quiet_guest();
	if (do_survive)
		ok &= survive();
	if (do_mlock)
		ok &= mlocked();
	json_begin(PROG);
	json_str("summary", ok ? "ok" : "wrong");
	json_end();
	return ok ? 0 : EXIT_WRONG;
}
