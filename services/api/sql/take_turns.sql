-- Waits until no other transaction of this shard counts quotas, and lets none do so before this
-- one ends; if its replica freezes, PostgreSQL ends it. The turn is waited for as long as a statement
-- may take, rows then as long as always: a turn is longer than a row is held.
-- $1 the lock's key, $2 milliseconds of a frozen turn, $3 milliseconds for a row.
SELECT set_config('lock_timeout', '0', true),
       pg_advisory_xact_lock($1),
       set_config('lock_timeout', $3, true),
       set_config('idle_in_transaction_session_timeout', $2, true)
