//! The predicates of `events tail --where`.
//!
//! ```text
//! predicate = conjunction ("||" conjunction)*
//! conjunction = test ("&&" test)*
//! test = "!" test | "(" predicate ")" | path [operator value]
//! operator = "==" | "!=" | "<" | "<=" | ">" | ">="
//! path = name ("." name | "[" digits "]")*
//! value = a text, a number, true, false or null, as in JSON
//! ```
//!
//! A path alone holds if there is a value other than `false` and `null`. An absent value is `null`. Numbers are
//! compared as numbers, texts by their code points; values of different types have no order.

use std::cmp::Ordering;
use std::fmt;

use serde_json::{Number, Value};

/// Most nested parentheses and negations.
const DEPTH_MAX: usize = 32;

/// A parsed predicate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Predicate {
    Or(Vec<Self>),
    And(Vec<Self>),
    Not(Box<Self>),
    /// The value at the path is neither absent nor `false` nor `null`.
    Holds(Path),
    Compared(Path, Operator, Value),
}

/// The way to a value within JSON.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Path(Vec<Step>);

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Name(String),
    Place(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operator {
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Operator {
    /// Longer ones first.
    const ALL: [(&'static str, Self); 6] = [
        ("==", Self::Equal),
        ("!=", Self::Unequal),
        ("<=", Self::LessOrEqual),
        (">=", Self::GreaterOrEqual),
        ("<", Self::Less),
        (">", Self::Greater),
    ];

    fn holds(self, found: &Value, wanted: &Value) -> bool {
        let order = order(found, wanted);
        match self {
            Self::Equal => order == Some(Ordering::Equal),
            Self::Unequal => order != Some(Ordering::Equal),
            Self::Less => order == Some(Ordering::Less),
            Self::LessOrEqual => order.is_some_and(Ordering::is_le),
            Self::Greater => order == Some(Ordering::Greater),
            Self::GreaterOrEqual => order.is_some_and(Ordering::is_ge),
        }
    }
}

/// Returns `None` for values without an order.
fn order(one: &Value, other: &Value) -> Option<Ordering> {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => numbers(one, other),
        (Value::String(one), Value::String(other)) => Some(one.cmp(other)),
        (Value::Bool(one), Value::Bool(other)) => Some(one.cmp(other)),
        (Value::Null, Value::Null) => Some(Ordering::Equal),
        _ => None,
    }
}

fn numbers(one: &Number, other: &Number) -> Option<Ordering> {
    match (one.as_i128(), other.as_i128()) {
        (Some(one), Some(other)) => Some(one.cmp(&other)),
        _ => one.as_f64()?.partial_cmp(&other.as_f64()?),
    }
}

impl Path {
    fn find<'v>(&self, value: &'v Value) -> &'v Value {
        self.0.iter().fold(value, |value, step| match step {
            Step::Name(name) => value.get(name).unwrap_or(&Value::Null),
            Step::Place(place) => value.get(place).unwrap_or(&Value::Null),
        })
    }

    fn root(&self) -> &str {
        match self.0.first() {
            Some(Step::Name(name)) => name,
            _ => "",
        }
    }
}

impl Predicate {
    /// Parses a predicate over values with these names.
    pub(crate) fn parse(text: &str, names: &[&str]) -> Result<Self, Mistake> {
        let mut parser = Parser { text, at: 0, names };
        let predicate = parser.disjunction(0)?;
        parser.blank();
        match parser.rest() {
            "" => Ok(predicate),
            _ => Err(parser.mistake("&&, || or the end")),
        }
    }

    /// Returns whether the predicate holds for a value.
    pub(crate) fn holds(&self, value: &Value) -> bool {
        match self {
            Self::Or(all) => all.iter().any(|one| one.holds(value)),
            Self::And(all) => all.iter().all(|one| one.holds(value)),
            Self::Not(one) => !one.holds(value),
            Self::Holds(path) => !matches!(path.find(value), Value::Null | Value::Bool(false)),
            Self::Compared(path, operator, wanted) => operator.holds(path.find(value), wanted),
        }
    }
}

/// A text that is not a predicate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mistake {
    column: usize,
    expected: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "column {}: expected {}", self.column, self.expected)
    }
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    names: &'t [&'t str],
}

impl<'t> Parser<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn mistake(&self, expected: impl Into<String>) -> Mistake {
        Mistake { column: self.text[..self.at].chars().count() + 1, expected: expected.into() }
    }

    fn blank(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn eat(&mut self, token: &str) -> bool {
        self.blank();
        let found = self.rest().starts_with(token);
        self.at += if found { token.len() } else { 0 };
        found
    }

    /// Returns the longest beginning of the rest with these characters.
    fn run(&mut self, is_part: impl Fn(char) -> bool) -> &'t str {
        let rest = self.rest();
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn disjunction(&mut self, depth: usize) -> Result<Predicate, Mistake> {
        let mut all = vec![self.conjunction(depth)?];
        while self.eat("||") {
            all.push(self.conjunction(depth)?);
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Predicate::Or(all) })
    }

    fn conjunction(&mut self, depth: usize) -> Result<Predicate, Mistake> {
        let mut all = vec![self.test(depth)?];
        while self.eat("&&") {
            all.push(self.test(depth)?);
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Predicate::And(all) })
    }

    fn test(&mut self, depth: usize) -> Result<Predicate, Mistake> {
        self.blank();
        if depth >= DEPTH_MAX {
            return Err(self.mistake(format!("at most {DEPTH_MAX} nested parentheses")));
        }
        if self.eat("!") {
            return Ok(Predicate::Not(Box::new(self.test(depth + 1)?)));
        }
        if self.eat("(") {
            let predicate = self.disjunction(depth + 1)?;
            return if self.eat(")") { Ok(predicate) } else { Err(self.mistake("a closing )")) };
        }
        let path = self.path()?;
        match Operator::ALL.into_iter().find(|(token, _)| self.eat(token)) {
            Some((_, operator)) => Ok(Predicate::Compared(path, operator, self.value()?)),
            None => Ok(Predicate::Holds(path)),
        }
    }

    fn path(&mut self) -> Result<Path, Mistake> {
        let begin = self.at;
        let mut steps = vec![Step::Name(self.name("a name, such as data.customer")?)];
        loop {
            if self.rest().starts_with('.') {
                self.at += 1;
                steps.push(Step::Name(self.name("a name after the .")?));
            } else if self.rest().starts_with('[') {
                self.at += 1;
                let place = self.run(|c| c.is_ascii_digit()).parse();
                let place =
                    place.map_err(|_| self.mistake("a number of an element, such as [0]"))?;
                if !self.rest().starts_with(']') {
                    return Err(self.mistake("a closing ]"));
                }
                self.at += 1;
                steps.push(Step::Place(place));
            } else {
                break;
            }
        }
        let path = Path(steps);
        if self.names.contains(&path.root()) {
            return Ok(path);
        }
        self.at = begin;
        Err(self.mistake(format!("one of {}, at the beginning of a path", self.names.join(", "))))
    }

    fn name(&mut self, expected: &str) -> Result<String, Mistake> {
        match self.run(|c| c.is_alphanumeric() || matches!(c, '_' | '-')) {
            "" => Err(self.mistake(expected)),
            name => Ok(name.to_owned()),
        }
    }

    fn value(&mut self) -> Result<Value, Mistake> {
        self.blank();
        let (begin, rest) = (self.at, self.rest());
        if rest.starts_with('"') {
            let mut texts = serde_json::Deserializer::from_str(rest).into_iter::<String>();
            if let Some(Ok(text)) = texts.next() {
                self.at += texts.byte_offset();
                return Ok(Value::String(text));
            }
        }
        let token = self.run(|c| c.is_alphanumeric() || "+-.".contains(c));
        serde_json::from_str(token).map_err(|_| {
            self.at = begin;
            self.mistake("a text in double quotes, a number, true, false or null")
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn holds(text: &str) -> bool {
        let event = json!({
            "type": "order.placed.v1",
            "version": 3,
            "data": {
                "customer": "c1", "cents": 250, "rate": 0.5, "is_new": true, "note": null,
                "lines": [{"sku": "a"}, {"sku": "b"}], "large": 18_446_744_073_709_551_615_u64,
            },
        });
        let predicate = Predicate::parse(text, &["type", "version", "data"]);
        predicate.unwrap_or_else(|mistake| panic!("{text}: {mistake}")).holds(&event)
    }

    #[test]
    fn values_are_compared_by_type() {
        for text in [
            r#"data.customer == "c1""#,
            r#"data.customer=="c1"&&version==3"#,
            r#"data.customer != "c2" && !(data.cents > 250)"#,
            "data.cents >= 250 && data.cents <= 250.0 && data.cents > 249.9",
            "data.rate < 1",
            "data.large > 9223372036854775807",
            r#"data.lines[1].sku == "b""#,
            "data.is_new",
            "data.is_new == true",
            "data.note == null && data.nothing == null && !data.note",
            r#"data.nothing != "x""#,
            r#"type > "order" || version == 17"#,
            r#"version == 17 && version == 3 || type == "order.placed.v1""#,
        ] {
            assert!(holds(text), "{text}");
        }
        for text in [
            r#"data.cents == "250""#,
            r#"data.cents < "251""#,
            "data.nothing < 1",
            "data.lines[2].sku",
            "data.customer.name",
            r#"(version == 17 || version == 3) && type == "x""#,
        ] {
            assert!(!holds(text), "{text}");
        }
    }

    #[test]
    fn a_mistake_names_column_and_remedy() {
        for (text, column, expected) in [
            ("", 1, "a name"),
            ("customer == 1", 1, "one of type, data"),
            ("data.customer = 1", 15, "&&, || or the end"),
            ("data.customer == 'c1'", 18, "double quotes"),
            ("data.customer == c1", 18, "double quotes"),
            ("data.lines == [1]", 15, "double quotes"),
            ("data. == 1", 6, "after the ."),
            ("data.lines[x]", 12, "[0]"),
            ("data.lines[1", 13, "closing ]"),
            ("(data.a == 1", 13, "closing )"),
            ("data.ä == \"ö\" &&", 17, "a name"),
        ] {
            let mistake = Predicate::parse(text, &["type", "data"]).expect_err(text);
            assert_eq!(mistake.column, column, "{text}: {mistake}");
            assert!(mistake.to_string().contains(expected), "{text}: {mistake}");
        }
        let deep = format!("{}data", "!".repeat(40));
        assert!(Predicate::parse(&deep, &["data"]).is_err());
    }
}
