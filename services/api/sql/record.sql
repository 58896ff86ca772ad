-- Adds increments and writes the operation rows that make each of them count once: one statement,
-- one commit, for many users.
--
-- Each parameter is an array in PostgreSQL's own notation:
-- $1 user ids, no one twice, $2 what to add to each of their scores.
-- $3 user ids, $4 operation ids, $5 increments, $6 what the user's later ones among them come to; no
-- pair of user and operation twice.
-- Returns a row for each operation that was added: its place in $3 from 1, the user's score right
-- after it, the latest, and when that was reached.
--
-- * An operation that is recorded already violates the key of score_ops and undoes the whole
--   statement (23505). The scores are raised first so that a twin in flight elsewhere is waited for
--   at the user's row.
-- * A user whose score would not fit is left out by the WHERE, and so are the operations.
-- * Rows are touched in the order of user ids, so that two statements cannot deadlock.
-- * Nothing is joined with a partitioned table: that plans badly over 256 partitions. INSERT routes.
WITH raised AS (
    INSERT INTO user_scores AS held (user_id, score, last_updated)
    SELECT user_id, delta::integer, clock_timestamp()
    FROM unnest($1::text::varchar[], $2::text::bigint[]) AS total (user_id, delta)
    WHERE delta <= 2147483647
    ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE
        -- clock_timestamp() here is read once the row is ours: when the score was really reached.
        SET score = held.score + excluded.score, last_updated = clock_timestamp()
        WHERE held.score <= 2147483647 - excluded.score
    RETURNING user_id, score, last_updated
), added AS (
    SELECT user_id, op_id, place, delta, raised.score - behind AS score,
           raised.score AS latest, last_updated
    FROM unnest($3::text::varchar[], $4::text::varchar[], $5::text::integer[],
                $6::text::bigint[])
         WITH ORDINALITY AS given (user_id, op_id, delta, behind, place)
    JOIN raised USING (user_id)
), kept AS (
    INSERT INTO score_ops (user_id, op_id, delta, score, created_at)
    SELECT user_id, op_id, delta, score, last_updated FROM added
    ORDER BY user_id, op_id
)
SELECT place, score, latest, (extract(epoch FROM last_updated) * 1000000)::bigint AS reached_us
FROM added
