// SPDX-License-Identifier: GPL-2.0
/*
 * Splits THPs that a parent and many children share, or that all children have
 * copied, and says what it took. Unmapping and mapping again walks the VMAs of
 * all of them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"

#define PROG	"bench_split"
#define SPLIT	"/sys/kernel/debug/split_huge_pages"

static struct region mem = { .kind = MEM_ANON, .folio_kb = PMD_KB };
static unsigned long thps = 4, children = 200, order, rounds = 5;
static bool cow;
static int cpu;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_split [option...]\n"
"  --thps N      2 MB folios split in each round, new ones each time (4)\n"
"  --children N  children that map them, fewer when memory is short (200)\n"
"  --cow         each child has copied all of it: nothing is shared\n"
"  --order N     of the folios that are made of them (0)\n"
"  --rounds N    round 0 warms up (5)\n"
"  --cpu N       where all of them run: no flush is sent anywhere (0)\n");
	exit(EXIT_UNABLE);
}

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "thps", required_argument, NULL, 't' },
		{ "children", required_argument, NULL, 'n' },
		{ "cow", no_argument, NULL, 'w' },
		{ "order", required_argument, NULL, 'o' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "cpu", required_argument, NULL, 'c' },
		{ }
	};
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 't': thps = parse_ulong("--thps", optarg); break;
		case 'n': children = parse_ulong("--children", optarg); break;
		case 'w': cow = true; break;
		case 'o': order = parse_ulong("--order", optarg); break;
		case 'r': rounds = parse_ulong("--rounds", optarg); break;
		case 'c': cpu = parse_ulong("--cpu", optarg); break;
		default: usage();
		}
	}
	if (optind != argc || !thps || !rounds || order > 8 || order == 1)
		usage();
	mem.bytes = thps * PMD_KB * KB;
}

static volatile uint64_t *word_of_page(size_t page)
{
	return (volatile uint64_t *)(mem.addr + page * BASE_PAGE);
}

/* Fork has given the child its mapping already. */
static unsigned long child_work(unsigned long nr)
{
	size_t i;

	if (cow)
		for (i = 0; i < mem.bytes / BASE_PAGE; i++)
			*word_of_page(i) = (nr << 32) + i;
	return 0;
}

static unsigned long child_check(unsigned long nr)
{
	unsigned long bad = 0;
	size_t i;

	if (!cow)
		return region_bad_words(&mem);
	for (i = 0; i < mem.bytes / BASE_PAGE; i++)
		bad += *word_of_page(i) != (nr << 32) + i;
	return bad;
}

struct round {
	unsigned long nr, children, mapped_before, mapped_after;
	int ret, interval;
	uint64_t ns;
	unsigned long made, bad, children_bad;
	struct stats vm[2];
	const char *wrong;
};

static void measure(struct round *r)
{
	char text[128];

	snprintf(text, sizeof(text), "%d,0x%lx,0x%lx,%lu", getpid(),
		 (unsigned long)mem.addr, (unsigned long)mem.addr + mem.bytes,
		 order);
	vmstat_read(&r->vm[0]);
	r->interval = mark_start();
	r->ns = now_ns();
	r->ret = write_file(SPLIT, text);
	r->ns = now_ns() - r->ns;
	mark_end();
	vmstat_read(&r->vm[1]);
}

/* How many of the folios that should be there now are. */
static unsigned long count_made(void)
{
	struct region now = mem;

	now.folio_kb = 4 << order;
	return region_intact_folios(&now);
}

static const char *what_is_wrong(const struct round *r)
{
	unsigned long mappers = cow ? 1 : r->children + 1;

	if (stat_delta(&r->vm[0], &r->vm[1], "thp_split_page") != (long)thps)
		return "not every THP was split";
	if (r->made != mem.bytes / (BASE_PAGE << order))
		return "the pages are not folios of the order asked for";
	if (r->mapped_before != mappers || r->mapped_after != mappers)
		return "a page was not mapped by as many as it should be";
	return NULL;
}

static bool round_ok(const struct round *r)
{
	return !r->ret && !r->bad && !r->children_bad && !r->wrong;
}

static void round_print(const struct round *r)
{
	json_begin(PROG);
	json_bool("cow", cow);
	json_int("order", order);
	json_int("interval", r->interval);
	json_int("round", r->nr);
	json_bool("warmup", !r->nr);
	json_int("ret", r->ret);
	json_int("ns", r->ns);
	json_int("pages", mem.bytes / BASE_PAGE);
	json_int("thps", thps);
	json_int("folios_made", r->made);
	json_int("children", r->children);
	json_int("children_asked", children);
	json_int("children_bad", r->children_bad);
	json_int("mapcount_before", r->mapped_before);
	json_int("mapcount", r->mapped_after);
	json_int("bad_words", r->bad);
	json_delta("vmstat", &r->vm[0], &r->vm[1]);
	if (r->wrong)
		json_str("wrong", r->wrong);
	json_bool("ok", round_ok(r));
	json_end();
}

/*
 * New children each time: those of the round before share memory that has
 * been split. They stay on the parent's CPU, so how TLBs are flushed does not
 * depend on where the scheduler puts them.
 */
static bool one_round(unsigned long nr)
{
	static struct round r;

	memset(&r, 0, sizeof(r));
	r.nr = nr;
	if (nr)
		region_unmap(&mem);
	region_make(&mem, 0);
	region_fill(&mem, nr + 1);
	drain_lru();
	r.children = children_affordable(children, cow ? mem.bytes / KB : 0, 0);
	children_start(r.children, 1, child_work, child_check);
	drain_lru();
	/* The last ones are still on their way to sleep. */
	usleep(5000);
	r.mapped_before = region_mapcount(&mem, mem.bytes / BASE_PAGE - 1);
	measure(&r);
	r.mapped_after = region_mapcount(&mem, mem.bytes / BASE_PAGE - 1);
	r.made = count_made();
	r.bad = region_bad_words(&mem);
	r.children_bad = children_end(r.children);
	r.wrong = what_is_wrong(&r);
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
	for (nr = 0; nr < rounds; nr++)
		ok &= one_round(nr);
	return ok ? 0 : EXIT_WRONG;
}
