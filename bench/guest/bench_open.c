// SPDX-License-Identifier: GPL-2.0
/*
 * What those pay who have nothing to do with migration, but meet its hooks: opening
 * a file for writing, and allocating memory where there is none without reclaim.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"

#define PROG	"bench_open"
#define POOL	"/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"

static const char *path = "/disk/open";
static unsigned long times = 1000, rounds = 5;
static bool alloc;

static void usage(void)
{
	fprintf(stderr,
"usage: bench_open [option...]\n"
"  --times N     a file is opened for reading and writing, and closed (1000)\n"
"  --alloc       instead, all memory and more is asked for, as huge pages\n"
"  --rounds N    round 0 warms up (5)\n"
"  --file PATH   (/disk/open)\n");
	exit(EXIT_UNABLE);
}

static void parse(int argc, char **argv)
{
	static const struct option opts[] = {
		{ "times", required_argument, NULL, 't' },
		{ "alloc", no_argument, NULL, 'a' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "file", required_argument, NULL, 'f' },
		{ }
	};
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case 't': times = parse_ulong("--times", optarg); break;
		case 'a': alloc = true; break;
		case 'r': rounds = parse_ulong("--rounds", optarg); break;
		case 'f': path = optarg; break;
		default: usage();
		}
	}
	if (optind != argc || !times || !rounds)
		usage();
}

static bool open_and_close(void)
{
	unsigned long i;
	int fd;

	for (i = 0; i < times; i++) {
		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd < 0 || close(fd))
			return false;
	}
	return true;
}

static bool one_round(unsigned long nr)
{
	struct stats vm[2];
	int interval;
	bool ok;

	vmstat_read(&vm[0]);
	interval = mark_start();
	ok = alloc ? !write_file(POOL, "100000") : open_and_close();
	mark_end();
	vmstat_read(&vm[1]);
	if (alloc && write_file(POOL, "0"))
		die(POOL ": %s", strerror(errno));

	json_begin(PROG);
	json_int("interval", interval);
	json_int("round", nr);
	json_bool("warmup", !nr);
	json_int("pages", alloc ? 1 : times);
	json_delta("vmstat", &vm[0], &vm[1]);
	json_bool("ok", ok);
	json_end();
	return ok;
}

int main(int argc, char **argv)
{
	unsigned long nr;
	bool ok = true;
	int fd;

	bench_init(PROG);
	parse(argc, argv);
	pin_and_reexec(0, argv);
	quiet_guest();
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0)
		die("%s: %s", path, strerror(errno));
	close(fd);
	for (nr = 0; nr < rounds; nr++)
		ok &= one_round(nr);
	unlink(path);
	return ok ? 0 : EXIT_WRONG;
}
