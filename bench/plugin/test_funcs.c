// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of the shadow stack in funcs.c, without QEMU: each case plays a made
 * up sequence of blocks and compares the counts with what it must be.
 */
#include "funcs.c"

#define TEXT		0xffffffff81000000ULL
#define FUNC_SIZE	0x1000ULL
#define BLOCK		16	/* bytes from one block to the next */
#define TASK_STACK	0xffffc90000100000ULL
#define IDLE_STACK	0xffffc90000200000ULL

/* The part of QEMU that funcs.c would call; blocks are made by hand here. */
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
					   qemu_plugin_vcpu_tb_trans_cb_t cb)
{
	(void)id;
	(void)cb;
}

void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb,
					  qemu_plugin_vcpu_udata_cb_t cb,
					  enum qemu_plugin_cb_flags flags,
					  void *userdata)
{
	(void)tb;
	(void)cb;
	(void)flags;
	(void)userdata;
}

void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *tb,
					      enum qemu_plugin_op op,
					      void *ptr, uint64_t imm)
{
	(void)tb;
	(void)op;
	(void)ptr;
	(void)imm;
}

void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *insn,
				      qemu_plugin_vcpu_mem_cb_t cb,
				      enum qemu_plugin_cb_flags flags,
				      enum qemu_plugin_mem_rw rw,
				      void *userdata)
{
	(void)insn;
	(void)cb;
	(void)flags;
	(void)rw;
	(void)userdata;
}

void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id,
				    qemu_plugin_udata_cb_t cb, void *userdata)
{
	(void)id;
	(void)cb;
	(void)userdata;
}

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb)
{
	(void)tb;
	return 0;
}

uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb)
{
	(void)tb;
	return 0;
}

struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb,
						 size_t idx)
{
	(void)tb;
	(void)idx;
	return NULL;
}

const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn)
{
	return insn;
}

size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn)
{
	(void)insn;
	return 0;
}

uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn)
{
	(void)insn;
	return 0;
}

static const char * const names[] = {
	"entry_SYSCALL_64", "__switch_to_asm", "__switch_to",
	"ret_from_fork_asm", "asm_sysvec_timer", "asm_exc_page_fault",
	"handler", "a", "b", "c", "d", "idle", "b.cold",
	"__x64_sys_sched_get_priority_min", "__x64_sys_sched_get_priority_max",
};

static unsigned int failed, checks;

static uint64_t addr_of(const char *name)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(names); i++)
		if (!strcmp(names[i], name))
			return TEXT + i * FUNC_SIZE;
	abort();
}

static void write_map(const char *path)
{
	FILE *f = fopen(path, "we");
	size_t i;

	if (!f)
		abort();
	for (i = 0; i < ARRAY_SIZE(names); i++)
		fprintf(f, "%016llx T %s\n",
			(unsigned long long)(TEXT + i * FUNC_SIZE), names[i]);
	fclose(f);
}

/* Executes block @nr of a function: @insns instructions, ending as @how. */
static const struct tb *run_at(const char *name, uint64_t offset,
			       uint64_t bytes, unsigned int insns,
			       enum tb_end how)
{
	uint64_t start = addr_of(name) + offset;
	const struct sym *sym = sym_of(start);
	struct tb *tb = xcalloc(1, sizeof(*tb));

	tb->start = start;
	tb->end = start + bytes;
	tb->func = sym->func;
	tb->func_start = sym->addr;
	tb->insns = insns;
	tb->total = insns;
	tb->how = how;
	tb_exec(0, tb);
	return tb;
}

static const struct tb *run(const char *name, unsigned int nr,
			    unsigned int insns, enum tb_end how)
{
	return run_at(name, nr * BLOCK, BLOCK, insns, how);
}

static void run_user(unsigned int insns)
{
	tb_exec(0, user_tb(insns));
}

static void begin(void)
{
	stack_seen(0, 0, TASK_STACK + 100, NULL);
	interval_start(0, NULL);
	run("__x64_sys_sched_get_priority_min", 0, 1, END_RET);
	run_user(1);
	run("entry_SYSCALL_64", 0, 10, END_CALL);
}

/* Ends the interval without the report, which would clear nothing. */
static void finish_case(void)
{
	atomic_store(&active, false);
	close_stacks(&cpus[0]);
}

static void check(const char *test, enum ctx ctx, const char *name,
		  uint64_t excl, uint64_t incl, uint64_t calls)
{
	struct count sum = sum_of(ctx, sym_of(addr_of(name))->func);

	checks++;
	if (sum.excl == excl && sum.incl == incl && sum.calls == calls)
		return;
	failed++;
	printf("not ok - %s: %s %s: %" PRIu64 "/%" PRIu64 "/%" PRIu64
	       ", expected %" PRIu64 "/%" PRIu64 "/%" PRIu64 "\n", test,
	       ctx_name[ctx], name, sum.excl, sum.incl, sum.calls, excl, incl,
	       calls);
}

static void check_lost(const char *test, uint64_t want)
{
	checks++;
	if (cpus[0].lost == want)
		return;
	failed++;
	printf("not ok - %s: lost %" PRIu64 ", expected %" PRIu64 "\n", test,
	       cpus[0].lost, want);
}

static void test_calls(void)
{
	const char *t = "calls";

	begin();
	run("a", 0, 5, END_CALL);
	run("b", 0, 7, END_RET);
	run("a", 1, 3, END_CALL);
	run("b", 0, 7, END_RET);
	run("a", 2, 2, END_RET);
	run("entry_SYSCALL_64", 1, 4, END_OTHER);
	run_user(1);
	finish_case();
	check(t, CTX_TASK, "b", 14, 14, 2);
	check(t, CTX_TASK, "a", 10, 24, 1);
	check(t, CTX_TASK, "entry_SYSCALL_64", 14, 38, 1);
	check_lost(t, 0);
}

/* b jumps to c, and c's ret goes to a: b includes c, and is left with it. */
static void test_tail_call(void)
{
	const char *t = "tail call";

	begin();
	run("a", 0, 5, END_CALL);
	run("b", 0, 7, END_OTHER);
	run("c", 0, 11, END_CALL);
	run("d", 0, 2, END_RET);
	run("c", 1, 1, END_RET);
	run("a", 1, 3, END_RET);
	run("entry_SYSCALL_64", 1, 4, END_OTHER);
	finish_case();
	check(t, CTX_TASK, "d", 2, 2, 1);
	check(t, CTX_TASK, "c", 12, 14, 1);
	check(t, CTX_TASK, "b", 7, 21, 1);
	check(t, CTX_TASK, "a", 8, 29, 1);
	check_lost(t, 0);
}

/* Two functions that jump to and fro: no growth, and one ret ends both. */
static void test_tail_loop(void)
{
	const char *t = "tail loop";
	int i;

	begin();
	run("a", 0, 1, END_CALL);
	for (i = 0; i < 1000; i++) {
		run("b", 0, 1, END_OTHER);
		run("c", 0, 1, END_OTHER);
	}
	run("c", 1, 1, END_RET);
	run("a", 1, 1, END_RET);
	run("entry_SYSCALL_64", 1, 1, END_OTHER);
	finish_case();
	check(t, CTX_TASK, "c", 1001, 1001, 1000);
	check(t, CTX_TASK, "b", 1000, 2001, 1);
	check(t, CTX_TASK, "a", 2, 2003, 1);
	check_lost(t, 0);
}

/* A jump to the cold part and back is no call. */
static void test_cold(void)
{
	const char *t = "cold part";

	begin();
	run("b", 0, 5, END_OTHER);
	run("b.cold", 0, 3, END_OTHER);
	run("b", 2, 1, END_RET);
	run("entry_SYSCALL_64", 1, 1, END_OTHER);
	finish_case();
	check(t, CTX_TASK, "b", 9, 9, 1);
	check_lost(t, 0);
}

/* a calls b calls a: what a costs is counted once. */
static void test_recursion(void)
{
	const char *t = "recursion";

	begin();
	run("a", 0, 1, END_CALL);
	run("b", 0, 2, END_CALL);
	run("a", 0, 1, END_CALL);
	run("c", 0, 4, END_RET);
	run("a", 1, 8, END_RET);
	run("b", 1, 16, END_RET);
	run("a", 1, 8, END_RET);
	run("entry_SYSCALL_64", 1, 1, END_OTHER);
	finish_case();
	check(t, CTX_TASK, "a", 18, 40, 2);
	check(t, CTX_TASK, "b", 18, 31, 1);
	check_lost(t, 0);
}

static void interrupt(unsigned int insns)
{
	run("asm_sysvec_timer", 0, 10, END_CALL);
	run("handler", 0, insns, END_RET);
	run("asm_sysvec_timer", 1, 10, END_IRET);
}

/* Between a call and its callee, and a second one right after the iret. */
static void test_interrupt(void)
{
	const char *t = "interrupt";

	begin();
	run("a", 0, 5, END_CALL);
	interrupt(100);
	interrupt(100);
	run("b", 0, 7, END_RET);
	interrupt(100);
	run("a", 1, 3, END_RET);
	run("entry_SYSCALL_64", 1, 4, END_OTHER);
	finish_case();
	check(t, CTX_TASK, "b", 7, 7, 1);
	check(t, CTX_TASK, "a", 8, 15, 1);
	check(t, CTX_TASK, "entry_SYSCALL_64", 14, 29, 1);
	check(t, CTX_TASK, "handler", 0, 0, 0);
	check(t, CTX_IRQ, "handler", 300, 300, 3);
	check(t, CTX_IRQ, "asm_sysvec_timer", 60, 360, 3);
	check_lost(t, 0);
}

/* An interrupt within an interrupt: only the inner one's time is its own. */
static void test_nested_interrupt(void)
{
	const char *t = "nested interrupt";

	begin();
	run("a", 0, 5, END_CALL);
	run("asm_exc_page_fault", 0, 10, END_CALL);
	run("handler", 0, 20, END_CALL);
	interrupt(100);
	run("c", 0, 1, END_RET);
	run("handler", 1, 20, END_RET);
	run("asm_exc_page_fault", 1, 10, END_IRET);
	run("b", 0, 7, END_RET);
	run("a", 1, 3, END_RET);
	run("entry_SYSCALL_64", 1, 4, END_OTHER);
	finish_case();
	check(t, CTX_TASK, "handler", 40, 41, 1);
	check(t, CTX_TASK, "asm_exc_page_fault", 20, 61, 1);
	check(t, CTX_TASK, "b", 7, 7, 1);
	check(t, CTX_TASK, "a", 8, 76, 1);
	check(t, CTX_IRQ, "handler", 100, 100, 1);
	check_lost(t, 0);
}

static void switch_to(uint64_t stack)
{
	const struct tb *tb = run("__switch_to_asm", 0, 15, END_OTHER);

	stack_switched(0, 0, stack + 200, (void *)tb);
	run("__switch_to", 0, 5, END_RET);
}

/* a sleeps, the idle task runs, an interrupt comes, a goes on. */
static void test_switch(void)
{
	const char *t = "context switch";

	begin();
	run("a", 0, 5, END_CALL);
	switch_to(IDLE_STACK);
	run("idle", 1, 1000, END_OTHER);
	interrupt(100);
	run("idle", 2, 1000, END_CALL);
	switch_to(TASK_STACK);
	run("a", 1, 3, END_RET);
	run("entry_SYSCALL_64", 1, 4, END_OTHER);
	finish_case();
	check(t, CTX_OTHER, "idle", 2000, 2015, 0);
	check(t, CTX_TASK, "idle", 0, 0, 0);
	check(t, CTX_TASK, "__switch_to", 5, 5, 1);
	check(t, CTX_TASK, "a", 8, 28, 1);
	check(t, CTX_TASK, "entry_SYSCALL_64", 14, 42, 1);
	check_lost(t, 0);
}

/* a calls b, a thunk, which pushes an address and "returns" to c. */
static void test_retpoline(void)
{
	const char *t = "retpoline";

	begin();
	run("a", 0, 5, END_CALL);
	run("b", 0, 1, END_CALL);
	run("b", 2, 2, END_RET);
	run("c", 0, 4, END_CALL);
	run("d", 0, 8, END_RET);
	run("c", 1, 4, END_RET);
	run("a", 1, 3, END_RET);
	run("entry_SYSCALL_64", 1, 4, END_OTHER);
	finish_case();
	check(t, CTX_TASK, "d", 8, 8, 1);
	check(t, CTX_TASK, "c", 8, 16, 1);
	check(t, CTX_TASK, "b", 3, 19, 1);
	check(t, CTX_TASK, "a", 8, 27, 1);
	check_lost(t, 0);
}

/* Blocks that QEMU left for I/O go on in their middle; b is called once. */
static void test_left_early(void)
{
	const char *t = "left early";

	begin();
	run_at("a", 0, BLOCK, 10, END_CALL);
	run_at("a", BLOCK / 2, BLOCK / 2, 5, END_CALL);
	run_at("b", 0, BLOCK, 7, END_RET);
	run_at("b", BLOCK / 2, BLOCK / 2, 3, END_RET);
	run("a", 1, 3, END_RET);
	run("entry_SYSCALL_64", 1, 4, END_OTHER);
	finish_case();
	check(t, CTX_TASK, "b", 10, 10, 1);
	check(t, CTX_TASK, "a", 18, 28, 1);
	check_lost(t, 0);
}

/* A ret to where nobody called from: found again, and said so. */
static void test_lost(void)
{
	const char *t = "lost";

	begin();
	run("a", 0, 5, END_RET);
	run("d", 1, 3, END_CALL);
	run("c", 0, 2, END_RET);
	run("d", 2, 3, END_OTHER);
	finish_case();
	check(t, CTX_TASK, "c", 2, 2, 1);
	check(t, CTX_TASK, "d", 6, 8, 0);
	check_lost(t, 1);
}

static void check_end(const char *bytes, size_t len, enum tb_end want)
{
	enum tb_end how = decode_end((const uint8_t *)bytes, len);

	checks++;
	if (how == want)
		return;
	failed++;
	printf("not ok - decode %02x...: %d, expected %d\n",
	       (unsigned char)bytes[0], how, want);
}

static void test_decode(void)
{
	check_end("\xe8\x00\x00\x00\x00", 5, END_CALL);
	check_end("\x2e\xe8\x00\x00\x00\x00", 6, END_CALL);
	check_end("\xff\xd0", 2, END_CALL);		/* call *%rax */
	check_end("\x41\xff\xd3", 3, END_CALL);		/* call *%r11 */
	check_end("\x3e\xff\xe0", 3, END_OTHER);	/* notrack jmp *%rax */
	check_end("\xff\x15\x00\x00\x00\x00", 6, END_CALL);
	check_end("\xff\x35\x00\x00\x00\x00", 6, END_OTHER);	/* push */
	check_end("\xc3", 1, END_RET);
	check_end("\xf3\xc3", 2, END_RET);
	check_end("\x48\xcf", 2, END_IRET);
	check_end("\x48\x0f\x07", 3, END_OTHER);	/* sysretq */
	check_end("\xe9\x00\x00\x00\x00", 5, END_OTHER);
	check_end("\x74\xc3", 2, END_OTHER);		/* je, not ret */
	check_end("\xf3\xa4", 2, END_OTHER);		/* rep movsb */
}

int main(int argc, char **argv)
{
	const char *map = argc > 1 ? argv[1] : "test.map";

	write_map(map);
	if (!read_map(map))
		return 1;
	cpus_init(1);
	test_calls();
	test_tail_call();
	test_tail_loop();
	test_cold();
	test_recursion();
	test_interrupt();
	test_nested_interrupt();
	test_switch();
	test_retpoline();
	test_left_early();
	test_lost();
	test_decode();
	printf("test_funcs: %u of %u checks failed\n", failed, checks);
	return failed ? 1 : 0;
}
