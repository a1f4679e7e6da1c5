// SPDX-License-Identifier: GPL-2.0
/*
 * The published fork-heavy workload: a parent with a small anonymous buffer
 * and many children that each wrote to every page of their copy. No page of
 * the parent is shared any more, but every child's VMA is still in the tree
 * that restoring a mapping walks, so mbind() of the parent's buffer costs
 * pages x children.
 *
 * And its relatives: a memfd of which the children touch a few pages only, and
 * memory that all of them map.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"

#define PROG		"bench_fork_mbind"

static struct region buf = { .kind = MEM_ANON, .folio_kb = 4 };
static unsigned long size_mb = 5, children = 1000, rounds = 4, jobs;
static long touch = -1;
static int cpu;
static bool pin = true, move_all, own_pages, one_cpu;
static const char *perf_ctl, *perf_ack;
static int ctl_fd = -1, ack_fd = -1;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_fork_mbind [option...]\n"
"  --mb N        size of the parent's buffer, MB (5)\n"
"  --children N  children, fewer when memory is short (1000)\n"
"  --kind anon|shmem  of the buffer; shmem is a memfd, needs --move-all (anon)\n"
"  --touch N     pages that each child touches (all). Of anon memory it copies\n"
"                them by writing; the others stay shared with the parent, and\n"
"                mbind() leaves them. Of a memfd it maps these pages only\n"
"  --own-pages   each child touches others: the first N, the next N ...\n"
"  --move-all    move what children map, too (MPOL_MF_MOVE_ALL)\n"
"  --rounds N    moves, node 0 -> 1 -> 0 ... (4)\n"
"  --jobs N      children that copy at the same time (online CPUs)\n"
"  --cpu N       where the parent runs, from its start (0)\n"
"  --one-cpu     children stay there, and their memory is spread over the nodes:\n"
"                nothing is left to the scheduler\n"
"  --no-pin      let it run anywhere: how it flushes TLBs is then left to chance\n"
"  --perf CTL,ACK  FIFOs of 'perf record --control': on around each move only\n");
	exit(EXIT_UNABLE);
}

static void split_perf(char *arg)
{
	char *comma = strchr(arg, ',');

	if (!comma)
		die("--perf wants two FIFOs, CTL,ACK");
	*comma = '\0';
	perf_ctl = arg;
	perf_ack = comma + 1;
}

static enum mem_kind parse_kind(const char *text)
{
	if (strcmp(text, "anon") && strcmp(text, "shmem"))
		usage();
	return strcmp(text, "anon") ? MEM_SHMEM : MEM_ANON;
}

static long all_pages(void)
{
	return buf.bytes / BASE_PAGE;
}

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "mb", required_argument, NULL, 'm' },
		{ "children", required_argument, NULL, 'c' },
		{ "kind", required_argument, NULL, 'k' },
		{ "touch", required_argument, NULL, 't' },
		{ "own-pages", no_argument, NULL, 'o' },
		{ "move-all", no_argument, NULL, 'a' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "jobs", required_argument, NULL, 'j' },
		{ "cpu", required_argument, NULL, 'p' },
		{ "one-cpu", no_argument, NULL, '1' },
		{ "no-pin", no_argument, NULL, 'n' },
		{ "perf", required_argument, NULL, 'f' },
		{ }
	};
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 'm': size_mb = parse_ulong("--mb", optarg); break;
		case 'c': children = parse_ulong("--children", optarg); break;
		case 'k': buf.kind = parse_kind(optarg); break;
		case 'o': own_pages = true; break;
		case 'a': move_all = true; break;
		case '1': one_cpu = true; break;
		case 't': touch = parse_ulong("--touch", optarg); break;
		case 'r': rounds = parse_ulong("--rounds", optarg); break;
		case 'j': jobs = parse_ulong("--jobs", optarg); break;
		case 'p': cpu = parse_ulong("--cpu", optarg); break;
		case 'n': pin = false; break;
		case 'f': split_perf(strdup(optarg)); break;
		default: usage();
		}
	}
	if (optind != argc || !size_mb || !rounds)
		usage();
	/* Without MPOL_MF_MOVE_ALL, pages would be left. */
	if (!move_all && (!touch || own_pages || buf.kind == MEM_SHMEM))
		usage();
	if (!jobs)
		jobs = one_cpu ? 1 : sysconf(_SC_NPROCESSORS_ONLN);
	buf.bytes = size_mb * MB;
	if (touch < 0 || touch > all_pages())
		touch = all_pages();
}

/* Where child @nr begins to touch; it goes on at the start of the buffer. */
static long first_page(unsigned long nr)
{
	return own_pages ? nr * touch % all_pages() : 0;
}

static long touched_page(unsigned long nr, long i)
{
	return (first_page(nr) + i) % all_pages();
}

static volatile uint64_t *touched_word(unsigned long nr, long i)
{
	return (volatile uint64_t *)(buf.addr +
				     touched_page(nr, i) * BASE_PAGE);
}

/* In how many page tables the pages of the buffer must be, in all. */
static unsigned long mappings(unsigned long nr)
{
	long kept = buf.kind == MEM_SHMEM ? touch : all_pages() - touch;

	return all_pages() + nr * kept;
}

/*
 * The child's own word per page, checked again when it is told to leave. A
 * memfd stays as it is, but it is written to: a read would map the pages around
 * the one that is touched as well.
 */
static unsigned long child_touches(unsigned long nr)
{
	long i;

	if (one_cpu)
		spread_over_nodes();
	else
		run_anywhere();
	for (i = 0; i < touch; i++) {
		if (buf.kind == MEM_ANON)
			*touched_word(nr, i) = (nr << 32) + i;
		else
			region_rewrite(&buf, touched_page(nr, i));
	}
	return 0;
}

static unsigned long child_checks(unsigned long nr)
{
	unsigned long bad = 0;
	long i;

	if (buf.kind == MEM_SHMEM || !touch)
		return region_bad_words(&buf);
	for (i = 0; i < touch; i++)
		bad += *touched_word(nr, i) != (nr << 32) + i;
	return bad;
}

static void perf_open(void)
{
	if (!perf_ctl)
		return;
	ctl_fd = open(perf_ctl, O_WRONLY | O_CLOEXEC);
	ack_fd = open(perf_ack, O_RDONLY | O_CLOEXEC);
	if (ctl_fd < 0 || ack_fd < 0)
		die("%s, %s: %s", perf_ctl, perf_ack, strerror(errno));
}

static void perf_switch(const char *cmd)
{
	char ack[16];

	if (!perf_ctl)
		return;
	if (write(ctl_fd, cmd, strlen(cmd)) != (ssize_t)strlen(cmd) ||
	    read(ack_fd, ack, sizeof(ack)) <= 0)
		die("perf does not answer '%s'", cmd);
}

struct round {
	unsigned long nr, children, mapcount, mappings, there, bad;
	long pages;
	int to, ret, interval;
	uint64_t ns;
	struct stats vm[2];
	const char *wrong;
};

static void measure(struct round *r)
{
	vmstat_read(&r->vm[0]);
	perf_switch("enable\n");
	r->interval = mark_start();
	r->ns = now_ns();
	r->ret = move_all ? mbind_move_all(&buf, r->to) :
			    mbind_move(&buf, r->to);
	r->ns = now_ns() - r->ns;
	mark_end();
	perf_switch("disable\n");
	vmstat_read(&r->vm[1]);
}

static const char *what_is_wrong(const struct round *r)
{
	if (r->mappings != mappings(r->children))
		return "the pages are not mapped by as many as they should be";
	if (one_cpu)
		return flush_mode_error(&r->vm[0], &r->vm[1], 0);
	return NULL;
}

static bool round_ok(const struct round *r)
{
	return !r->ret && r->there == (unsigned long)r->pages && !r->bad &&
	       !r->wrong;
}

static void round_print(const struct round *r)
{
	json_begin(PROG);
	json_str("kind", buf.kind == MEM_ANON ? "anon" : "shmem");
	json_int("interval", r->interval);
	json_int("round", r->nr);
	json_int("to", r->to);
	json_int("ns", r->ns);
	json_int("ret", r->ret);
	json_int("mb", size_mb);
	json_int("pages", r->pages);
	json_int("pages_there", r->there);
	json_int("bad_words", r->bad);
	json_int("children", r->children);
	json_int("children_asked", children);
	json_int("touch", touch);
	json_bool("own_pages", own_pages);
	json_bool("move_all", move_all);
	json_int("mapcount", r->mapcount);
	json_int("mappings", r->mappings);
	json_delta("vmstat", &r->vm[0], &r->vm[1]);
	if (r->wrong)
		json_str("wrong", r->wrong);
	json_bool("ok", round_ok(r));
	json_end();
}

static bool one_round(unsigned long nr, unsigned long children)
{
	struct region moved = buf;
	static struct round r;

	r.nr = nr;
	r.children = children;
	r.to = (nr + 1) % 2;
	/* Without MPOL_MF_MOVE_ALL, what is still shared stays. */
	r.pages = move_all || !children ? all_pages() : touch;
	measure(&r);

	moved.bytes = r.pages * BASE_PAGE;
	r.there = region_pages_on(&moved, r.to);
	r.bad = region_bad_words(&buf);
	r.mapcount = region_mapcount(&buf, 0);
	r.mappings = region_mappings(&buf);
	r.wrong = what_is_wrong(&r);
	round_print(&r);
	if (r.wrong)
		progress("round %lu: %s", nr, r.wrong);
	return round_ok(&r);
}

/* Memory of its own that a child needs. */
static unsigned long child_kb(void)
{
	return buf.kind == MEM_ANON ? touch * (BASE_PAGE / KB) : 0;
}

int main(int argc, char **argv)
{
	unsigned long nr, r, bad;
	bool ok = true;

	bench_init(PROG);
	parse(argc, argv);
	if (pin)
		pin_and_reexec(cpu, argv);
	if (nr_nodes() < 2)
		die("two NUMA nodes are needed, this guest has %d", nr_nodes());
	quiet_guest();
	region_make(&buf, 0);
	perf_open();

	nr = children_affordable(children, child_kb(), 2 * buf.bytes / KB);
	if (nr < children)
		progress("memory for %lu of %lu children only", nr, children);
	children_start(nr, jobs, child_touches, child_checks);
	progress("%lu children have touched %ld pages each", nr, touch);
	/* The last ones are still on their way to sleep. */
	usleep(5000);
	for (r = 0; r < rounds; r++)
		ok &= one_round(r, nr);
	bad = children_end(nr);
	if (bad) {
		ok = false;
		progress("%lu children found their memory changed, or died", bad);
	}
	json_begin(PROG);
	json_str("summary", ok ? "ok" : "wrong");
	json_int("children", nr);
	json_int("children_asked", children);
	json_int("children_bad", bad);
	json_end();
	return ok ? 0 : EXIT_WRONG;
}
