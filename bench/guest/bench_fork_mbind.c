// SPDX-License-Identifier: GPL-2.0
/*
 * The published fork-heavy workload: a parent with a small anonymous buffer
 * and many children that each wrote to every page of their copy. No page of
 * the parent is shared any more, but every child's VMA is still in the tree
 * that restoring a mapping walks, so mbind() of the parent's buffer costs
 * pages x children.
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
static bool pin = true;
static const char *perf_ctl, *perf_ack;
static int ctl_fd = -1, ack_fd = -1;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_fork_mbind [option...]\n"
"  --mb N        size of the parent's buffer, MB (5)\n"
"  --children N  children, fewer when memory is short (1000)\n"
"  --touch N     pages that each child copies by writing; the others stay\n"
"                shared with the parent, and mbind() leaves them (all)\n"
"  --rounds N    moves, node 0 -> 1 -> 0 ... (4)\n"
"  --jobs N      children that copy at the same time (online CPUs)\n"
"  --cpu N       where the parent runs, from its start (0)\n"
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

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "mb", required_argument, NULL, 'm' },
		{ "children", required_argument, NULL, 'c' },
		{ "touch", required_argument, NULL, 't' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "jobs", required_argument, NULL, 'j' },
		{ "cpu", required_argument, NULL, 'p' },
		{ "no-pin", no_argument, NULL, 'n' },
		{ "perf", required_argument, NULL, 'f' },
		{ }
	};
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 'm': size_mb = parse_ulong("--mb", optarg); break;
		case 'c': children = parse_ulong("--children", optarg); break;
		case 't': touch = parse_ulong("--touch", optarg); break;
		case 'r': rounds = parse_ulong("--rounds", optarg); break;
		case 'j': jobs = parse_ulong("--jobs", optarg); break;
		case 'p': cpu = parse_ulong("--cpu", optarg); break;
		case 'n': pin = false; break;
		case 'f': split_perf(strdup(optarg)); break;
		default: usage();
		}
	}
	if (optind != argc || !size_mb || !rounds || !touch)
		usage();
	if (!jobs)
		jobs = sysconf(_SC_NPROCESSORS_ONLN);
	buf.bytes = size_mb * MB;
	if (touch < 0 || (unsigned long)touch > buf.bytes / BASE_PAGE)
		touch = buf.bytes / BASE_PAGE;
}

/* The child's own word per page, checked again when it is told to leave. */
static unsigned long child_copies(unsigned long nr)
{
	volatile uint64_t *w = (volatile uint64_t *)buf.addr;
	const size_t step = BASE_PAGE / sizeof(*w);
	long i;

	run_anywhere();
	for (i = 0; i < touch; i++)
		w[i * step] = (nr << 32) + i;
	return 0;
}

static unsigned long child_checks(unsigned long nr)
{
	volatile uint64_t *w = (volatile uint64_t *)buf.addr;
	const size_t step = BASE_PAGE / sizeof(*w);
	unsigned long bad = 0;
	long i;

	for (i = 0; i < touch; i++)
		bad += w[i * step] != (nr << 32) + i;
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

static bool one_round(unsigned long r, unsigned long nr)
{
	struct region moved = buf;
	unsigned long there, bad;
	struct stats before, after;
	int to = (r + 1) % 2, ret, interval;
	uint64_t ns;

	vmstat_read(&before);
	perf_switch("enable\n");
	interval = mark_start();
	ns = now_ns();
	ret = mbind_move(&buf, to);
	ns = now_ns() - ns;
	mark_end();
	perf_switch("disable\n");
	vmstat_read(&after);

	moved.bytes = touch * BASE_PAGE;
	there = region_pages_on(&moved, to);
	bad = region_bad_words(&buf);
	json_begin(PROG);
	json_int("interval", interval);
	json_int("round", r);
	json_int("to", to);
	json_int("ns", ns);
	json_int("ret", ret);
	json_int("mb", size_mb);
	json_int("pages", touch);
	json_int("pages_there", there);
	json_int("bad_words", bad);
	json_int("children", nr);
	json_int("children_asked", children);
	json_int("touch", touch);
	json_delta("vmstat", &before, &after);
	json_bool("ok", !ret && there == (unsigned long)touch && !bad);
	json_end();
	return !ret && there == (unsigned long)touch && !bad;
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

	nr = children_affordable(children, touch * (BASE_PAGE / KB),
				 2 * buf.bytes / KB);
	if (nr < children)
		progress("memory for %lu of %lu children only", nr, children);
	children_start(nr, jobs, child_copies, child_checks);
	progress("%lu children have copied %ld pages each", nr, touch);
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
