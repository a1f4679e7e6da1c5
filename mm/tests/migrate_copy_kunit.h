/* SPDX-License-Identifier: GPL-2.0-only */
/* What an administrator may write, and what is made of it: mm/migrate_copy.c includes this. */
#ifdef CONFIG_MIGRATION_BATCH_COPY_KUNIT_TEST

#include <kunit/test.h>

static const struct {
	const char *names;
	int err;
	unsigned long mask;
} reason_cases[] = {
	{ "none\n", 0, 0 },
	{ "all", 0, BIT(MR_NEVER) - 1 },
	{ "compaction", 0, BIT(MR_COMPACTION) },
	{ "demotion,damon\n", 0, BIT(MR_DEMOTION) | BIT(MR_DAMON) },
	{ " demotion  damon ", 0, BIT(MR_DEMOTION) | BIT(MR_DAMON) },
	{ "demotion,,demotion", 0, BIT(MR_DEMOTION) },
	{ "", -EINVAL },
	{ ",", -EINVAL },
	{ "demotion damn", -EINVAL },
	{ "demotionx", -EINVAL },
	{ "demo", -EINVAL },
	{ "all demotion", -EINVAL },
	{ "[damon]", -EINVAL },
	/* What has never been migrated is not migrated. */
	{ "never_migrated", -EINVAL },
};

static void reasons_by_name(struct kunit *test)
{
	unsigned long mask;
	char buf[64];
	int i;

	for (i = 0; i < ARRAY_SIZE(reason_cases); i++) {
		strscpy(buf, reason_cases[i].names);
		KUNIT_EXPECT_EQ_MSG(test, parse_reasons(buf, &mask), reason_cases[i].err,
				    "'%s'", reason_cases[i].names);
		if (!reason_cases[i].err)
			KUNIT_EXPECT_EQ_MSG(test, mask, reason_cases[i].mask, "'%s'",
					    reason_cases[i].names);
	}
}

/* Each that is shown can be written. */
static void each_reason_has_a_name(struct kunit *test)
{
	unsigned long mask;
	char buf[64];
	int i;

	for (i = 0; i < MR_NEVER; i++) {
		strscpy(buf, migrate_reason_names[i]);
		KUNIT_EXPECT_EQ(test, parse_reasons(buf, &mask), 0);
		KUNIT_EXPECT_EQ(test, mask, BIT(i));
	}
}

static struct kunit_case migrate_copy_cases[] = {
	KUNIT_CASE(reasons_by_name),
	KUNIT_CASE(each_reason_has_a_name),
	{}
};

static struct kunit_suite migrate_copy_suite = {
	.name = "migrate_copy",
	.test_cases = migrate_copy_cases,
};

kunit_test_suite(migrate_copy_suite);

#endif /* CONFIG_MIGRATION_BATCH_COPY_KUNIT_TEST */
