//! The SQL rights each role needs on PostgreSQL, as GRANT lines, and the rights a login lacks.
//!
//! The role `admin` owns the toolkit's tables and runs `migrate` and the operators' commands. A
//! service creates and owns the tables and views of its read models. On the toolkit's tables a
//! service has exactly the rights for its own writes: a service never updates or deletes an event
//! or an audit row.

use sqlx::PgConnection;

use crate::schema;

/// The purpose of a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Only reads: `status`, `events tail`, `stream show`, queries of read models.
    Reader,
    /// Runs `doctor`.
    Doctor,
    /// Runs projections only.
    Worker,
    /// Takes commands and runs projections.
    Service,
    /// Owns the tables and runs `migrate` and all commands with changes.
    Admin,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 5] =
        [Self::Service, Self::Worker, Self::Reader, Self::Doctor, Self::Admin];

    /// The name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Doctor => "doctor",
            Self::Worker => "worker",
            Self::Service => "service",
            Self::Admin => "admin",
        }
    }

    /// The default name of the SQL role: `kafold_NAME`.
    pub fn default_login(self) -> String {
        format!("kafold_{}", self.name())
    }

    fn on_schema(self) -> &'static [&'static str] {
        match self {
            Self::Reader | Self::Doctor => &["USAGE"],
            // A rebuild creates tables.
            Self::Worker | Self::Service | Self::Admin => &["USAGE", "CREATE"],
        }
    }
}

type Rights = &'static [&'static str];

/// The rights of a service and of a worker on each table; readers have SELECT on every table.
const TABLES: &[(&str, Rights, Rights)] = &[
    ("kafold_migrations", &["SELECT"], &["SELECT"]),
    ("kafold_event", &["SELECT", "INSERT"], &[]),
    ("kafold_partition", &["SELECT", "INSERT", "UPDATE"], &[]),
    ("kafold_partition_digest", &["SELECT", "INSERT", "UPDATE"], &[]),
    ("kafold_snapshot", &["SELECT", "INSERT", "UPDATE"], &[]),
    ("kafold_projection", &["SELECT", "INSERT", "UPDATE"], &["SELECT", "INSERT", "UPDATE"]),
    (
        "kafold_checkpoint",
        &["SELECT", "INSERT", "UPDATE", "DELETE"],
        &["SELECT", "INSERT", "UPDATE", "DELETE"],
    ),
    (
        "kafold_parked_event",
        &["SELECT", "INSERT", "UPDATE", "DELETE"],
        &["SELECT", "INSERT", "UPDATE", "DELETE"],
    ),
    (
        "kafold_projection_category",
        &["SELECT", "INSERT", "DELETE"],
        &["SELECT", "INSERT", "DELETE"],
    ),
    (
        "kafold_late_event",
        &["SELECT", "INSERT", "UPDATE", "DELETE"],
        &["SELECT", "INSERT", "UPDATE", "DELETE"],
    ),
    (
        "kafold_node",
        &["SELECT", "INSERT", "UPDATE", "DELETE"],
        &["SELECT", "INSERT", "UPDATE", "DELETE"],
    ),
    ("kafold_skipped_event", &["SELECT", "DELETE"], &["SELECT", "DELETE"]),
    ("kafold_audit", &["SELECT", "INSERT"], &["SELECT", "INSERT"]),
    ("kafold_audit_head", &["SELECT", "UPDATE"], &["SELECT", "UPDATE"]),
];

/// Returns the rights of a role on the tables of this version's migration set.
fn on_tables(role: Role) -> impl Iterator<Item = (&'static str, Rights)> {
    let set = schema::postgres();
    let exists = move |table: &str| {
        let create = format!("CREATE TABLE {table} ");
        let made = |migration: &sqlx::migrate::Migration| migration.sql.as_str().contains(&create);
        table == schema::TABLE || set.iter().any(made)
    };
    let rights = move |(table, service, worker): &(&'static str, Rights, Rights)| {
        let rights: Rights = match role {
            Role::Service => service,
            Role::Worker => worker,
            Role::Reader | Role::Doctor => &["SELECT"],
            Role::Admin => &[],
        };
        (*table, rights)
    };
    let tables = TABLES.iter().filter(move |(table, ..)| exists(table)).map(rights);
    tables.filter(|(_, rights)| !rights.is_empty())
}

/// Returns the GRANT lines for the rights of a role, for the schema `public`.
///
/// A login gets its rights on read models from the process which makes them: the same rights as the
/// login's rights on `kafold_checkpoint`.
pub fn grants(role: Role, login: &str) -> Vec<String> {
    let to = quoted(login);
    let mut lines = vec![grant(role.on_schema(), "SCHEMA public", &to)];
    lines.extend(on_tables(role).map(|(table, rights)| grant(rights, table, &to)));
    lines
}

fn grant(rights: &[&str], object: &str, to: &str) -> String {
    format!("GRANT {} ON {object} TO {to};", rights.join(", "))
}

/// Returns an SQL name, quoted where SQL requires quotation marks.
fn quoted(name: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    let begins = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    if begins && name.bytes().all(is_plain) {
        return name.to_owned();
    }
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Returns the missing rights of a role as SQL lines, for the login of the connection or for
/// another login. Returns no lines when the login has all rights. Missing tables are skipped.
pub async fn missing(
    connection: &mut PgConnection,
    role: Role,
    login: Option<&str>,
) -> Result<Vec<String>, sqlx::Error> {
    let sql = "SELECT COALESCE($1, current_user)::text, COALESCE(current_schema(), 'public')::text";
    let (login, schema): (String, String) =
        sqlx::query_as(sql).bind(login).fetch_one(&mut *connection).await?;
    let (to, in_schema) = (quoted(&login), format!("SCHEMA {}", quoted(&schema)));

    let sql = "SELECT r FROM UNNEST($3::text[]) WITH ORDINALITY AS asked (r, i) \
               WHERE NOT has_schema_privilege($1, $2, r) ORDER BY i";
    let query = sqlx::query_scalar(sql).bind(&login).bind(&schema).bind(role.on_schema());
    let on_schema: Vec<String> = query.fetch_all(&mut *connection).await?;
    let mut lines = Vec::new();
    if !on_schema.is_empty() {
        let rights: Vec<_> = on_schema.iter().map(String::as_str).collect();
        lines.push(grant(&rights, &in_schema, &to));
    }

    let asked: Vec<_> = on_tables(role)
        .flat_map(|(table, rights)| rights.iter().map(move |right| (table, *right)))
        .collect();
    let (tables, rights): (Vec<_>, Vec<_>) = asked.into_iter().unzip();
    // `to_regclass` finds nothing in a schema without USAGE.
    let sql = "SELECT c.relname::text, string_agg(r, ', ' ORDER BY i) \
               FROM UNNEST($3::text[], $4::text[]) WITH ORDINALITY AS asked (t, r, i) \
               JOIN pg_class c ON c.relname = t AND c.relkind = 'r' \
               JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = $2 \
               WHERE NOT has_table_privilege($1, c.oid, r) GROUP BY c.relname ORDER BY MIN(i)";
    let query = sqlx::query_as(sql).bind(&login).bind(&schema).bind(tables).bind(rights);
    let on_tables: Vec<(String, String)> = query.fetch_all(&mut *connection).await?;
    lines.extend(on_tables.iter().map(|(table, rights)| grant(&[rights], table, &to)));

    if role == Role::Admin {
        lines.extend(foreign_tables(connection, &login, &schema, &to).await?);
    }
    if matches!(role, Role::Reader | Role::Admin) {
        lines.extend(hidden_read_models(connection, &login, &schema, &to).await?);
    }
    Ok(lines)
}

/// Returns the GRANT line without which the login does not see the table of migrations. PostgreSQL
/// leaves a schema without USAGE out of the search path, so the tables of the schema seem missing.
pub(crate) async fn hidden_tables(
    connection: &mut PgConnection,
) -> Result<Option<String>, sqlx::Error> {
    let sql = "SELECT current_user::text, n.nspname::text, has_schema_privilege(n.oid, 'USAGE') \
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
               WHERE c.relname = $1 AND c.relkind = 'r' \
                 AND n.nspname = ANY(string_to_array(replace(replace( \
                   current_setting('search_path'), '\"$user\"', current_user), ' ', ''), ',')) \
                 AND NOT (has_schema_privilege(n.oid, 'USAGE') \
                   AND has_table_privilege(c.oid, 'SELECT')) \
               LIMIT 1";
    let query = sqlx::query_as(sql).bind(schema::TABLE);
    let found: Option<(String, String, bool)> = query.fetch_optional(connection).await?;
    Ok(found.map(|(login, schema, has_usage)| match has_usage {
        true => grant(&["SELECT"], schema::TABLE, &quoted(&login)),
        false => grant(&["USAGE"], &format!("SCHEMA {}", quoted(&schema)), &quoted(&login)),
    }))
}

/// Returns the toolkit's tables with an owner other than the login.
async fn foreign_tables(
    connection: &mut PgConnection,
    login: &str,
    schema: &str,
    to: &str,
) -> Result<Vec<String>, sqlx::Error> {
    let sql = "SELECT c.relname::text FROM pg_class c \
               JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = $2 \
               WHERE c.relname = ANY($3) AND c.relkind = 'r' \
                 AND NOT pg_has_role($1, c.relowner, 'USAGE') ORDER BY 1";
    let tables: Vec<_> = on_tables(Role::Reader).map(|(table, _)| table).collect();
    let query = sqlx::query_scalar(sql).bind(login).bind(schema).bind(tables);
    let names: Vec<String> = query.fetch_all(connection).await?;
    Ok(names.iter().map(|name| format!("ALTER TABLE {name} OWNER TO {to};")).collect())
}

/// Returns the GRANT lines for the read models' views without SELECT for the login, at most
/// [`HIDDEN_MAX`].
async fn hidden_read_models(
    connection: &mut PgConnection,
    login: &str,
    schema: &str,
    to: &str,
) -> Result<Vec<String>, sqlx::Error> {
    // A read model is a view on the table of one of its generations.
    let sql = "SELECT v.relname::text FROM pg_class v \
               JOIN pg_namespace n ON n.oid = v.relnamespace AND n.nspname = $2 \
               WHERE v.relkind = 'v' AND NOT has_table_privilege($1, v.oid, 'SELECT') \
                 AND EXISTS (SELECT 1 FROM pg_class t WHERE t.relnamespace = v.relnamespace \
                   AND t.relkind = 'r' AND starts_with(t.relname, v.relname || '__g')) \
               ORDER BY 1 LIMIT $3";
    let query = sqlx::query_scalar(sql).bind(login).bind(schema).bind(HIDDEN_MAX);
    let names: Vec<String> = query.fetch_all(connection).await?;
    Ok(names.iter().map(|name| grant(&["SELECT"], &quoted(name), to)).collect())
}

/// Most read models named as hidden from a reader.
const HIDDEN_MAX: i64 = 20;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn lines(role: Role) -> Vec<String> {
        grants(role, &role.default_login())
    }

    #[test]
    fn every_table_of_the_migration_set_has_its_rights() {
        let sql: Vec<_> = schema::postgres().iter().map(|m| m.sql.as_str().to_owned()).collect();
        let named = |statement: &str| -> HashSet<String> {
            let after = sql.iter().flat_map(|sql| sql.split(statement).skip(1));
            let name = |text: &str| text.split([' ', '(', ';']).next().map(str::to_owned);
            after.filter_map(name).collect()
        };
        for table in named("CREATE TABLE ").difference(&named("DROP TABLE ")) {
            assert!(TABLES.iter().any(|(known, ..)| known == table), "{table} is not in TABLES");
        }
    }

    #[test]
    fn a_service_never_changes_events_or_audit_rows() {
        for role in [Role::Service, Role::Worker, Role::Reader, Role::Doctor] {
            for line in lines(role) {
                let is_kept = line.contains("kafold_event") || line.contains("ON kafold_audit ");
                let changes = line.contains("UPDATE") || line.contains("DELETE");
                assert!(!(is_kept && changes), "{line}");
            }
        }
        let service = lines(Role::Service);
        assert!(
            service.contains(&"GRANT SELECT, INSERT ON kafold_event TO kafold_service;".into())
        );
        assert!(lines(Role::Worker).iter().all(|line| !line.contains("kafold_event ")));
    }

    #[test]
    fn a_login_that_is_no_plain_name_is_quoted() {
        assert_eq!(quoted("kafold_2"), "kafold_2");
        assert_eq!(quoted("Bo\"b"), "\"Bo\"\"b\"");
        assert_eq!(quoted("2"), "\"2\"");
        assert_eq!(quoted(""), "\"\"");
    }
}
