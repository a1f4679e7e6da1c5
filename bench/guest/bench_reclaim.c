// SPDX-License-Identifier: GPL-2.0
/*
 * Reclaims anonymous memory made of folios of one size with MADV_PAGEOUT, and
 * says what it took: swapped out to zram; freed, because MADV_FREE had been
 * called for it; or kept, because it was written to after that.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/swap.h>
#include <unistd.h>

#include "bench.h"

#define PROG		"bench_reclaim"
#define ZRAM		"/sys/block/zram0/"
#define ZRAM_DEV	"/dev/zram0"

#ifndef MADV_FREE
#define MADV_FREE	8
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT	21
#endif

enum how { SWAP, LAZYFREE, REDIRTIED };

static const char * const how_names[] = { "swap", "lazyfree", "redirtied" };

static struct region mem = { .kind = MEM_ANON, .folio_kb = 64 };
static unsigned long size_mb = 64, rounds = 5;
static enum flush_mode mode = FLUSH_LOCAL;
static enum how how = SWAP;
static bool split_pmd;
static int cpu;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_reclaim [option...]\n"
"  --how swap          swapped out to zram, and read back (the default)\n"
"        lazyfree      MADV_FREE, then reclaimed: nothing is written\n"
"        redirtied     MADV_FREE, then one word of each folio is written: all\n"
"                      of it has to be kept\n"
"  --folio KB          4, 16, 32, 64 ... 2048 (64)\n"
"  --split-pmd         PMD-mapped folios are mapped by PTEs first\n"
"  --mb N              memory reclaimed, MB; new for each round (64)\n"
"  --rounds N          round 0 warms up (5)\n"
"  --mode local|deferred  TLB flushes, as for bench_move, but deferred is not\n"
"                      checked: x86 forgets a CPU that sleeps after some flushes,\n"
"                      and each 2 MB are flushed at least once (local)\n"
"  --cpu N             where it runs (0)\n");
	exit(EXIT_UNABLE);
}

static enum how parse_how(const char *text)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(how_names); i++)
		if (!strcmp(text, how_names[i]))
			return i;
	usage();
	return SWAP;
}

static enum flush_mode parse_mode(const char *text)
{
	if (strcmp(text, "local") && strcmp(text, "deferred"))
		usage();
	return strcmp(text, "local") ? FLUSH_DEFERRED : FLUSH_LOCAL;
}

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "how", required_argument, NULL, 'h' },
		{ "folio", required_argument, NULL, 'f' },
		{ "split-pmd", no_argument, NULL, 'p' },
		{ "mb", required_argument, NULL, 'm' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "mode", required_argument, NULL, 'd' },
		{ "cpu", required_argument, NULL, 'c' },
		{ }
	};
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 'h': how = parse_how(optarg); break;
		case 'f': mem.folio_kb = parse_ulong("--folio", optarg); break;
		case 'p': split_pmd = true; break;
		case 'm': size_mb = parse_ulong("--mb", optarg); break;
		case 'r': rounds = parse_ulong("--rounds", optarg); break;
		case 'd': mode = parse_mode(optarg); break;
		case 'c': cpu = parse_ulong("--cpu", optarg); break;
		default: usage();
		}
	}
	mem.bytes = size_mb * MB;
	if (optind != argc || !rounds || mem.folio_kb < 4 ||
	    (mem.folio_kb & (mem.folio_kb - 1)) || mem.folio_kb > PMD_KB ||
	    !mem.bytes || mem.bytes % (mem.folio_kb * KB))
		usage();
	if (split_pmd && mem.folio_kb != PMD_KB)
		die("--split-pmd needs --folio %lu", PMD_KB);
}

/* The first page of a swap device; include/linux/swap.h. */
union swap_header {
	struct {
		char bootbits[1024];
		uint32_t version;
		uint32_t last_page;
		uint32_t nr_badpages;
	} info;
	struct {
		char reserved[BASE_PAGE - 10];
		char magic[10];
	} magic;
};

static void write_swap_header(unsigned long bytes)
{
	union swap_header header = { };
	int fd;

	header.info.version = 1;
	header.info.last_page = bytes / BASE_PAGE - 1;
	memcpy(header.magic.magic, "SWAPSPACE2", sizeof(header.magic.magic));
	fd = open(ZRAM_DEV, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, &header, sizeof(header)) != sizeof(header) ||
	    fsync(fd))
		die(ZRAM_DEV ": %s", strerror(errno));
	close(fd);
}

/* Twice what is needed: a large folio wants its entries side by side. */
static void swap_setup(void)
{
	unsigned long bytes = 2 * mem.bytes;
	char text[32];

	write_file(ZRAM "comp_algorithm", "lz4");
	snprintf(text, sizeof(text), "%lu", bytes);
	require_file(ZRAM "disksize", text);
	write_swap_header(bytes);
	/* What comes back is what was asked for, and no more. */
	write_file("/proc/sys/vm/page-cluster", "0");
	if (swapon(ZRAM_DEV, 0))
		die("swapon " ZRAM_DEV ": %s", strerror(errno));
}

struct round {
	unsigned long nr;
	int ret, interval;
	uint64_t ns;
	struct stats vm[3], mthp[2];
	long rss_kb, swap_kb, pmd_kb_before, pmd_kb;
	unsigned long bad, intact;
	const char *wrong;
};

/* A change of access to a part of the range takes a mapping by PTEs. */
static void split_pmds(void)
{
	size_t off;

	for (off = 0; off < mem.bytes; off += PMD_KB * KB)
		if (mprotect(mem.addr + off, BASE_PAGE, PROT_READ) ||
		    mprotect(mem.addr + off, BASE_PAGE, PROT_READ | PROT_WRITE))
			die("mprotect: %s", strerror(errno));
}

/* The word that was there before: contents can be checked as ever. */
static void redirty(void)
{
	volatile uint64_t *w;
	size_t off;

	for (off = 0; off < mem.bytes; off += mem.folio_kb * KB) {
		w = (volatile uint64_t *)(mem.addr + off);
		*w = *w;
	}
}

static void prepare(unsigned long nr)
{
	if (nr)
		region_unmap(&mem);
	region_make(&mem, 0);
	region_fill(&mem, nr + 1);
	if (split_pmd)
		split_pmds();
	/* Folios that wait to be put on a list cannot be isolated. */
	drain_lru();
	if (how == SWAP)
		return;
	if (madvise(mem.addr, mem.bytes, MADV_FREE))
		die("MADV_FREE: %s", strerror(errno));
	drain_lru();
	if (how == REDIRTIED)
		redirty();
}

static void measure(struct round *r)
{
	r->pmd_kb_before = smaps_kb(mem.addr, "AnonHugePages");
	flush_mode_turn();
	vmstat_read(&r->vm[0]);
	mthp_read(&r->mthp[0], mem.folio_kb);
	r->interval = mark_start();
	r->ns = now_ns();
	r->ret = madvise(mem.addr, mem.bytes, MADV_PAGEOUT) ? -errno : 0;
	r->ns = now_ns() - r->ns;
	mark_end();
	vmstat_read(&r->vm[1]);
	mthp_read(&r->mthp[1], mem.folio_kb);
	r->rss_kb = smaps_kb(mem.addr, "Rss");
	r->swap_kb = smaps_kb(mem.addr, "Swap");
	r->pmd_kb = smaps_kb(mem.addr, "AnonHugePages");
}

static long delta(const struct round *r, const char *name)
{
	return stat_delta(&r->vm[0], &r->vm[1], name);
}

/*
 * Folios stay in the swap cache until writing them has ended and reclaim finds
 * them again. Only when they have left it do contents come from the device.
 */
static void empty_swap_cache(void)
{
	char text[64];
	int tries;

	snprintf(text, sizeof(text), "%lu swappiness=max", mem.bytes);
	for (tries = 0; tries < 10; tries++) {
		static struct stats st;

		vmstat_read(&st);
		if (stat_get(&st, "nr_swapcached") * BASE_PAGE < mem.bytes / 64)
			return;
		write_file("/sys/devices/system/node/node0/reclaim", text);
	}
}

static unsigned long nonzero_words(void)
{
	const uint64_t *w = (const uint64_t *)mem.addr;
	size_t i, n = mem.bytes / sizeof(*w);
	unsigned long bad = 0;

	for (i = 0; i < n; i++)
		bad += !!w[i];
	return bad;
}

static void check_swapped(struct round *r)
{
	long pages = mem.bytes / BASE_PAGE, kb = mem.bytes / KB, in;

	empty_swap_cache();
	r->bad = region_bad_words(&mem);
	vmstat_read(&r->vm[2]);
	in = stat_delta(&r->vm[1], &r->vm[2], "pswpin");
	if (delta(r, "pswpout") < pages || r->swap_kb != kb || r->rss_kb)
		r->wrong = "not all was swapped out";
	else if (in < pages - pages / 64)
		r->wrong = "contents did not come from the swap device";
	else if (mem.folio_kb > 4 &&
		 stat_delta(&r->mthp[0], &r->mthp[1], "swpout") !=
		 (long)region_folios(&mem))
		r->wrong = "folios were split before they were written";
}

static void check_freed(struct round *r)
{
	if (delta(r, "pglazyfreed") != (long)(mem.bytes / BASE_PAGE) ||
	    r->rss_kb)
		r->wrong = "not all was freed";
	else if (stat_delta(&r->mthp[0], &r->mthp[1], "split_deferred"))
		r->wrong = "folios were queued for a deferred split";
	r->bad = nonzero_words();
}

/* Whether the PMDs still map the folios is a finding, not an error. */
static void check_kept(struct round *r)
{
	r->intact = region_intact_folios(&mem);
	r->bad = region_bad_words(&mem);
	if (delta(r, "pglazyfreed") || r->rss_kb != (long)(mem.bytes / KB))
		r->wrong = "something was freed that had been written to";
	else if (r->intact != region_folios(&mem))
		r->wrong = "folios were split";
	else if (split_pmd && r->pmd_kb_before)
		r->wrong = "still mapped by PMDs";
}

static bool round_ok(const struct round *r)
{
	return !r->ret && !r->bad && !r->wrong;
}

static void round_print(const struct round *r)
{
	json_begin(PROG);
	json_str("how", how_names[how]);
	json_int("folio_kb", mem.folio_kb);
	json_str("mode", mode == FLUSH_LOCAL ? "local" : "deferred");
	json_int("interval", r->interval);
	json_int("round", r->nr);
	json_bool("warmup", !r->nr);
	json_int("ret", r->ret);
	json_int("ns", r->ns);
	json_int("pages", mem.bytes / BASE_PAGE);
	json_int("folios", region_folios(&mem));
	json_int("rss_kb", r->rss_kb);
	json_int("swap_kb", r->swap_kb);
	json_int("pmd_mapped_kb_before", r->pmd_kb_before);
	json_int("pmd_mapped_kb", r->pmd_kb);
	if (how == SWAP)
		json_int("pages_read_back", stat_delta(&r->vm[1], &r->vm[2],
						       "pswpin"));
	if (how == REDIRTIED)
		json_int("folios_intact", r->intact);
	json_int("bad_words", r->bad);
	json_delta("vmstat", &r->vm[0], &r->vm[1]);
	json_delta("mthp", &r->mthp[0], &r->mthp[1]);
	if (r->wrong)
		json_str("wrong", r->wrong);
	json_bool("ok", round_ok(r));
	json_end();
}

static bool one_round(unsigned long nr)
{
	static struct round r;

	memset(&r, 0, sizeof(r));
	r.nr = nr;
	prepare(nr);
	measure(&r);
	if (how == SWAP)
		check_swapped(&r);
	else if (how == LAZYFREE)
		check_freed(&r);
	else
		check_kept(&r);
	if (!r.wrong && mode == FLUSH_LOCAL)
		r.wrong = flush_mode_error(&r.vm[0], &r.vm[1], 0);
	round_print(&r);
	if (r.wrong)
		progress("round %lu: %s", nr, r.wrong);
	return round_ok(&r);
}

int main(int argc, char **argv)
{
	unsigned long nr;
	bool ok = true;

	bench_init(PROG);
	parse(argc, argv);
	pin_and_reexec(cpu, argv);
	quiet_guest();
	if (how == SWAP)
		swap_setup();
	flush_mode_start(mode, cpu, false);
	for (nr = 0; nr < rounds; nr++)
		ok &= one_round(nr);
	return ok ? 0 : EXIT_WRONG;
}
