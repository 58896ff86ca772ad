-- What tells two copies of one partition apart: of each table how many rows, and the sum of their
-- hashes, whatever their order. {partition} is the end of the partition's name.
SELECT (SELECT count(*) FROM user_scores_{partition}) AS users,
       (SELECT coalesce(sum(score), 0) FROM user_scores_{partition}) AS score,
       (SELECT sum(hashtextextended(held::text, 0)) FROM user_scores_{partition} AS held) AS users_hash,
       (SELECT count(*) FROM score_ops_{partition}) AS operations,
       (SELECT sum(hashtextextended(op::text, 0)) FROM score_ops_{partition} AS op) AS operations_hash,
       (SELECT sum(hashtextextended(sums::text, 0)) FROM score_ops_pruned_{partition} AS sums) AS pruned_hash
