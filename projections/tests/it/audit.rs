//! The record of acts: a removed, altered or inserted row is noticed on both databases.

use crate::common;

use common::TestDatabase;
use kafold_core::Clock;
use kafold_core::clock::SystemClock;
use kafold_migrations::{Database, Mode};
use kafold_projections::sqlx::{self, AssertSqlSafe, Executor};
use kafold_projections::{AuditVerification, By, Control, ControlError};
use serde_json::Value;

on_both!(
    a_record_that_nobody_touched_verifies,
    rows_are_refused_to_be_changed_or_removed,
    a_removed_row_is_named,
    an_altered_row_is_named,
    a_row_that_was_altered_with_its_hash_is_named,
    an_inserted_row_is_named,
    the_newest_rows_removed_are_named,
    all_rows_removed_are_noticed,
    a_lost_head_is_noticed_and_nothing_is_entered_without_it,
    a_prune_is_on_record_and_the_rest_verifies,
    rows_removed_as_if_pruned_are_noticed,
    writers_at_once_make_one_chain,
    rows_of_before_the_chain_are_chained_by_the_migration,
);

const ME: By<'static> = By { actor: "me", reason: Some("a test") };

/// Records acts on a projection without a worker.
async fn record(database: &TestDatabase, acts: usize) -> Control {
    let now = match database.database {
        Database::Postgres(_) => "now()",
        Database::Sqlite(_) => "0",
    };
    let sql = format!(
        "INSERT INTO kafold_projection (name, live_generation, fingerprint, desired_state, \
           actual_state, updated_at) VALUES ('sales', 1, 'v1: id text', 'running', 'running', {now})"
    );
    run(database, &sql).await.expect("inserted");
    let control = Control::new(database.database.clone());
    for _ in 0..acts {
        control.resume("sales", ME).await.expect("entered");
    }
    control
}

async fn run(database: &TestDatabase, sql: &str) -> Result<(), sqlx::Error> {
    let query = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
    match &database.database {
        Database::Postgres(database) => database.pool().execute(query).await.map(drop),
        Database::Sqlite(database) => {
            let mut tx = database.write().await?;
            tx.execute(query).await?;
            tx.commit().await
        }
    }
}

/// Changes the tables with full rights on the database.
async fn tamper(database: &TestDatabase, sql: &str) {
    let let_go = match database.database {
        Database::Postgres(_) => {
            "ALTER TABLE kafold_audit DISABLE TRIGGER USER; \
             ALTER TABLE kafold_audit_head DISABLE TRIGGER USER"
        }
        Database::Sqlite(_) => {
            "DROP TRIGGER kafold_audit_kept_update; DROP TRIGGER kafold_audit_kept_delete; \
             DROP TRIGGER kafold_audit_head_kept"
        }
    };
    run(database, let_go).await.expect("allowed");
    run(database, sql).await.expect("done");
}

async fn verify(control: &Control) -> AuditVerification {
    control.verify_audit().await.expect("readable")
}

/// Expects one finding with all these words.
async fn finds(control: &Control, words: &[&str]) {
    let found = verify(control).await;
    let [finding] = found.findings.as_slice() else { panic!("one finding: {found:?}") };
    assert_eq!(found.findings_total, 1);
    for word in words {
        assert!(finding.contains(word), "{word:?} is not in {finding:?}");
    }
}

async fn a_record_that_nobody_touched_verifies(database: &TestDatabase) {
    let found = verify(&Control::new(database.database.clone())).await;
    assert_eq!((found.rows, found.newest, found.findings), (0, 0, Vec::new()));
    let found = verify(&record(database, 3).await).await;
    assert_eq!((found.rows, found.newest, found.findings), (3, 3, Vec::new()));
    assert_eq!(found.newest_hash.len(), 64);
}

async fn rows_are_refused_to_be_changed_or_removed(database: &TestDatabase) {
    let control = record(database, 3).await;
    let mut statements = vec![
        "UPDATE kafold_audit SET actor = 'you'",
        "UPDATE kafold_audit SET hash = NULL WHERE id = 3",
        "DELETE FROM kafold_audit",
        "DELETE FROM kafold_audit_head",
    ];
    match database.database {
        Database::Postgres(_) => {
            statements.extend(["TRUNCATE kafold_audit", "TRUNCATE kafold_audit_head"]);
        }
        Database::Sqlite(_) => statements.push(
            "REPLACE INTO kafold_audit (id, at, actor, action) VALUES (2, 0, 'you', 'nothing')",
        ),
    }
    for sql in statements {
        let refused = run(database, sql).await.expect_err(sql).to_string();
        assert!(refused.contains("kafold audit prune --older-than"), "{sql}: {refused}");
    }
    assert!(verify(&control).await.findings.is_empty());
}

async fn a_removed_row_is_named(database: &TestDatabase) {
    let control = record(database, 5).await;
    tamper(database, "DELETE FROM kafold_audit WHERE id = 3").await;
    finds(&control, &["row 3 was removed"]).await;
    run(database, "DELETE FROM kafold_audit WHERE id IN (1, 2)").await.expect("removed");
    finds(&control, &["rows 1 to 3 were removed"]).await;
}

async fn an_altered_row_is_named(database: &TestDatabase) {
    let control = record(database, 3).await;
    tamper(database, "UPDATE kafold_audit SET details = '{}' WHERE id = 2").await;
    finds(&control, &["row 2 (resume by me) was altered"]).await;
    control.resume("sales", ME).await.expect("acts are entered all the same");
    finds(&control, &["row 2"]).await;
}

async fn a_row_that_was_altered_with_its_hash_is_named(database: &TestDatabase) {
    let control = record(database, 3).await;
    // A valid row of another record.
    let row =
        "actor = 'you', previous_hash = (SELECT previous_hash FROM kafold_audit WHERE id = 1)";
    tamper(database, &format!("UPDATE kafold_audit SET {row} WHERE id = 2")).await;
    let content = kafold_migrations::audit::AuditContent {
        id: 2,
        actor: "you".into(),
        ..content(database, 2).await
    };
    let hash = kafold_migrations::audit::hex(&content.hash(&[0; 32]));
    let hash = match database.database {
        Database::Postgres(_) => format!("decode('{hash}', 'hex')"),
        Database::Sqlite(_) => format!("x'{hash}'"),
    };
    run(database, &format!("UPDATE kafold_audit SET hash = {hash} WHERE id = 2"))
        .await
        .expect("set");
    let found = verify(&control).await;
    assert_eq!(found.findings_total, 2, "{found:?}");
    assert!(found.findings[0].contains("row 2 (resume by you) does not follow row 1"), "{found:?}");
    assert!(found.findings[1].contains("row 3 (resume by me) does not follow row 2"), "{found:?}");
}

async fn content(database: &TestDatabase, id: i64) -> kafold_migrations::audit::AuditContent {
    let sql = "SELECT id, at, actor, action, projection, details FROM kafold_audit WHERE id = $1";
    let row = match &database.database {
        Database::Postgres(database) => {
            sqlx::query_as(sql).bind(id).fetch_one(database.pool()).await
        }
        Database::Sqlite(database) => {
            sqlx::query_as(sql).bind(id).fetch_one(database.readers()).await
        }
    };
    row.expect("it is there")
}

async fn an_inserted_row_is_named(database: &TestDatabase) {
    let control = record(database, 3).await;
    let columns = "id, at, actor, action, projection, details, previous_hash, hash";
    let copy = "at, 'you', action, projection, details, previous_hash, hash FROM kafold_audit";
    let insert =
        |id| format!("INSERT INTO kafold_audit ({columns}) SELECT {id}, {copy} WHERE id = 3");
    run(database, &insert(4)).await.expect("inserting is allowed");
    let found = verify(&control).await;
    assert!(
        found.findings[0].contains("row 4 (resume by you) was altered, or inserted"),
        "{found:?}"
    );
    let bare = "INSERT INTO kafold_audit (id, at, actor, action) SELECT 9, at, 'you', 'x' \
                FROM kafold_audit WHERE id = 1";
    run(database, bare).await.expect("inserting is allowed");
    let found = verify(&control).await;
    let named =
        found.findings.iter().any(|finding| finding.contains("row 9 (x by you) has no hash"));
    assert!(named, "{found:?}");
}

async fn the_newest_rows_removed_are_named(database: &TestDatabase) {
    let control = record(database, 5).await;
    tamper(database, "DELETE FROM kafold_audit WHERE id > 3").await;
    finds(&control, &["newest rows", "rows 4 to 5 were removed"]).await;
}

async fn all_rows_removed_are_noticed(database: &TestDatabase) {
    let control = record(database, 5).await;
    tamper(database, "DELETE FROM kafold_audit").await;
    finds(&control, &["all rows were removed", "there were 5"]).await;
}

async fn a_lost_head_is_noticed_and_nothing_is_entered_without_it(database: &TestDatabase) {
    let control = record(database, 2).await;
    tamper(database, "DELETE FROM kafold_audit_head").await;
    finds(&control, &["kafold_audit_head has lost its row"]).await;
    let refused = control.resume("sales", ME).await.expect_err("refused").to_string();
    assert!(refused.contains("kafold_audit_head has lost its row"), "{refused}");
}

async fn a_prune_is_on_record_and_the_rest_verifies(database: &TestDatabase) {
    let control = record(database, 4).await;
    let unexplained = control.prune(SystemClock.now(), By { reason: None, ..ME }).await;
    assert!(matches!(unexplained, Err(ControlError::Refused(_))), "{unexplained:?}");
    assert_eq!(control.prune(chrono::DateTime::UNIX_EPOCH, ME).await.expect("pruned"), 0);
    assert_eq!(verify(&control).await.rows, 4, "nothing was removed, nothing is told");

    assert_eq!(control.prune(SystemClock.now(), ME).await.expect("pruned"), 4);
    let found = verify(&control).await;
    assert_eq!((found.rows, found.pruned_to, found.findings), (1, 4, Vec::new()));
    let acts = control.audit(None, 10).await.expect("readable");
    let details = acts[0].details.as_deref().expect("details");
    for words in ["\"rows\":4", "\"last_id\":4", "\"last_hash\":", "\"reason\":\"a test\""] {
        assert!(details.contains(words), "{words} is not in {details}");
    }
    control.resume("sales", ME).await.expect("entered");
    assert_eq!(control.prune(SystemClock.now(), ME).await.expect("pruned"), 2, "a prune, too");
    let found = verify(&control).await;
    assert_eq!((found.rows, found.pruned_to, found.findings), (1, 6, Vec::new()));
    control.resume("sales", ME).await.expect("entered");
    assert_eq!(control.prune(SystemClock.now(), ME).await.expect("pruned"), 2);
    let acts = control.audit(None, 10).await.expect("readable");
    let details: Value =
        serde_json::from_str(acts[0].details.as_deref().expect("details")).expect("JSON");
    let earlier = details["earlier"].as_array().expect("a list").iter();
    let earlier: Vec<_> =
        earlier.map(|prune| [&prune["id"], &prune["rows"], &prune["last_id"]]).collect();
    assert_eq!(earlier, [[5, 4, 4], [7, 2, 6]], "both prunes stay on record");
    assert_eq!(details["earlier"][0]["reason"], "a test");
    let refused = run(database, "DELETE FROM kafold_audit").await;
    assert!(refused.is_err(), "what let go of the rows keeps them again");
}

async fn rows_removed_as_if_pruned_are_noticed(database: &TestDatabase) {
    let control = record(database, 5).await;
    let as_if = "UPDATE kafold_audit_head SET row_count = 3, pruned_id = 2, \
                   pruned_hash = (SELECT hash FROM kafold_audit WHERE id = 2); \
                 DELETE FROM kafold_audit WHERE id <= 2";
    tamper(database, as_if).await;
    finds(&control, &["up to row 2 were removed", "no prune is on record"]).await;
}

async fn writers_at_once_make_one_chain(database: &TestDatabase) {
    let control = record(database, 0).await;
    let acts = |_| {
        let control = control.clone();
        tokio::spawn(async move {
            for _ in 0..10 {
                control.resume("sales", ME).await.expect("entered");
            }
        })
    };
    let writers: Vec<_> = (0..5).map(acts).collect();
    let mut pruned = 0;
    for _ in 0..3 {
        pruned += control.prune(SystemClock.now(), ME).await.expect("pruned");
    }
    for writer in writers {
        writer.await.expect("it has entered all");
    }
    let found = verify(&control).await;
    assert!(found.findings.is_empty(), "{found:?}");
    let entered = found.rows + pruned;
    assert!((50..=53).contains(&entered), "{entered} with {pruned} pruned");
    assert_eq!(u64::try_from(found.newest), Ok(entered), "without gaps");
}

async fn rows_of_before_the_chain_are_chained_by_the_migration(database: &TestDatabase) {
    // The tables before the migration: rows without hashes, and with gaps.
    let (chaining, now) = match database.database {
        Database::Postgres(_) => (13, "now()"),
        Database::Sqlite(_) => (15, "1700000000000000"),
    };
    for id in [1, 2, 5, 6] {
        let sql = format!(
            "INSERT INTO kafold_audit (id, at, actor, action, projection, details) \
             VALUES ({id}, {now}, 'old', 'pause', 'sales', NULL)"
        );
        run(database, &sql).await.expect("inserted");
    }
    let undone = format!("DELETE FROM kafold_migrations WHERE version = {chaining}");
    run(database, &undone).await.expect("deleted");
    let again = match database.database {
        Database::Postgres(_) => {
            "DROP TABLE kafold_audit_head; DROP FUNCTION kafold_audit_head_kept"
        }
        Database::Sqlite(_) => {
            "DROP TRIGGER kafold_audit_kept_insert; DROP TRIGGER kafold_audit_kept_update; \
             DROP TRIGGER kafold_audit_kept_delete"
        }
    };
    run(database, again).await.expect("dropped");
    Database::open(&database.url, Mode::Migrate).await.expect("migrated");
    let control = record(database, 1).await;
    let found = verify(&control).await;
    assert_eq!((found.rows, found.newest, found.findings), (5, 7, Vec::new()));
    tamper(database, "DELETE FROM kafold_audit WHERE id = 5").await;
    finds(&control, &["rows 3 to 5 were removed"]).await;
}
