-- Operations that are recorded already, with the users' scores by now. $1 user ids, $2 operation ids.
-- LATERAL with LIMIT is a look-up by key for each pair, in its partition only.
SELECT user_id, op_id, found.delta, found.score, held.score AS latest,
       (extract(epoch FROM held.last_updated) * 1000000)::bigint AS reached_us
FROM unnest($1::varchar[], $2::varchar[]) AS given (user_id, op_id)
CROSS JOIN LATERAL (
    SELECT delta, score FROM score_ops AS kept
    WHERE kept.user_id = given.user_id AND kept.op_id = given.op_id
    LIMIT 1
) AS found
CROSS JOIN LATERAL (
    SELECT score, last_updated FROM user_scores AS scored
    WHERE scored.user_id = given.user_id
    LIMIT 1
) AS held
