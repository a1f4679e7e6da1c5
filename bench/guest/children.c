// SPDX-License-Identifier: GPL-2.0
/* Many children that do something, and then live until they are let go. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"

/* Kernel memory of a child: stack, mm, VMAs, page tables; measured ~190K. */
#define CHILD_KB	256UL
/* Left free for the rest of the guest. */
#define RESERVE_KB	(192UL * 1024)

/* Children report on one pipe and live until the other one is closed. */
static int done_pipe[2], live_pipe[2];
static pid_t *pids;

/*
 * As many children as the memory that is free now lets live, when each needs
 * @child_kb of its own and @keep_kb is to stay free.
 */
unsigned long children_affordable(unsigned long want, unsigned long child_kb,
				  unsigned long keep_kb)
{
	unsigned long per_kb = child_kb + CHILD_KB;
	unsigned long reserve = RESERVE_KB + keep_kb;
	unsigned long free_kb = 0;
	int node;

	if (!want)
		return 0;
	for (node = 0; node < nr_nodes(); node++)
		free_kb += mem_free_kb(node);
	if (free_kb < reserve + per_kb)
		die("%lu kB free: not enough for one child of %lu kB and %lu kB kept back",
		    free_kb, per_kb, reserve);
	free_kb = (free_kb - reserve) / per_kb;
	return want < free_kb ? want : free_kb;
}

static void child_main(unsigned long nr, child_fn work, child_fn check)
{
	unsigned long bad;
	char done = 0;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(live_pipe[1]);
	close(done_pipe[0]);
	bad = work(nr);
	if (write(done_pipe[1], &done, 1) != 1)
		_exit(EXIT_UNABLE);
	/* End of file is the event: the parent closed its end. */
	while (read(live_pipe[0], &done, 1) < 0 && errno == EINTR)
		;
	bad += check(nr);
	_exit(bad ? EXIT_WRONG : 0);
}

/* A child that was killed says nothing: look for its body now and then. */
static void wait_one_done(void)
{
	struct pollfd pfd = { .fd = done_pipe[0], .events = POLLIN };
	char c;

	while (poll(&pfd, 1, 1000) <= 0)
		if (waitpid(-1, NULL, WNOHANG) > 0)
			die("a child died before it was ready (out of memory?)");
	if (read(done_pipe[0], &c, 1) != 1)
		die("pipe: %s", strerror(errno));
}

static void kill_children(unsigned long nr)
{
	unsigned long i;

	for (i = 0; i < nr; i++)
		kill(pids[i], SIGKILL);
}

static void raise_process_limit(void)
{
	struct rlimit lim = { RLIM_INFINITY, RLIM_INFINITY };

	setrlimit(RLIMIT_NPROC, &lim);
	write_file("/proc/sys/kernel/pid_max", "65536");
	write_file("/proc/sys/kernel/threads-max", "65536");
}

/*
 * Forks @nr children. Each calls @work at once, at most @jobs at a time, and
 * @check when it is let go; both return how much they found wrong. When this
 * returns, all children have done their work, and wait.
 */
void children_start(unsigned long nr, unsigned long jobs, child_fn work,
		    child_fn check)
{
	uint64_t start = now_ns();
	unsigned long i, running = 0;

	raise_process_limit();
	pids = xcalloc(nr + 1, sizeof(*pids));
	if (pipe2(done_pipe, O_CLOEXEC) || pipe2(live_pipe, O_CLOEXEC))
		die("pipe: %s", strerror(errno));
	for (i = 0; i < nr; i++) {
		pids[i] = fork();
		if (pids[i] < 0) {
			kill_children(i);
			die("fork of child %lu: %s", i, strerror(errno));
		}
		if (!pids[i])
			child_main(i, work, check);
		if (++running > jobs) {
			wait_one_done();
			running--;
		}
		if (i && !(i % 100))
			progress("%lu of %lu children, about %lu s left", i, nr,
				 (unsigned long)((now_ns() - start) / i *
						 (nr - i) / 1000000000));
	}
	while (running--)
		wait_one_done();
}

/* Returns how many children found something wrong, or did not end well. */
unsigned long children_end(unsigned long nr)
{
	unsigned long i, bad = 0;
	int status;

	close(live_pipe[1]);
	for (i = 0; i < nr; i++) {
		if (waitpid(pids[i], &status, 0) != pids[i] ||
		    !WIFEXITED(status) || WEXITSTATUS(status))
			bad++;
	}
	close(live_pipe[0]);
	close(done_pipe[0]);
	close(done_pipe[1]);
	free(pids);
	return bad;
}
