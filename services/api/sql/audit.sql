-- Compares the scores of one partition with the sums of their operations, removed ones included.
-- One statement is one snapshot: writers and pruning go on meanwhile.
--
-- {partition} is the end of the partition's name.
-- Returns how many users there are, and who differs: a score of NULL is operations without a score.
WITH counted AS (
    SELECT user_id, sum(delta)::bigint AS total
    FROM (
        SELECT user_id, delta::bigint FROM score_ops_{partition}
        UNION ALL
        SELECT user_id, delta FROM score_ops_pruned_{partition}
    ) AS operation
    GROUP BY user_id
), compared AS (
    SELECT user_id, score, coalesce(total, 0) AS total
    FROM user_scores_{partition} FULL JOIN counted USING (user_id)
)
SELECT count(*) AS users,
       array_agg(user_id) FILTER (WHERE score IS DISTINCT FROM total) AS user_ids,
       array_agg(score) FILTER (WHERE score IS DISTINCT FROM total) AS scores,
       array_agg(total) FILTER (WHERE score IS DISTINCT FROM total) AS totals
FROM compared
