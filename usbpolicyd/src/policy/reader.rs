//! Reads TOML tables key by key and remembers where each stands, so that a mistake is reported with file, line, key
//! and what is allowed. All mistakes of a file are collected, not only the first.

use std::fmt::Display;
use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{LineIndex, Origin, Problem, Severity};
use super::schema::Flap;

/// Where the mistakes of one file go.
pub(super) struct Sink<'a> {
    file: &'a str,
    lines: LineIndex<'a>,
    pub(super) problems: Vec<Problem>,
}

impl<'a> Sink<'a> {
    pub(super) fn new(file: &'a str, text: &'a str) -> Self {
        Self { file, lines: LineIndex::new(text), problems: Vec::new() }
    }

    pub(super) fn origin(&self, span: &Range<usize>) -> Origin {
        let (line, column, _) = self.lines.locate(span.start, span.len());
        Origin { file: self.file.to_owned(), line, column }
    }

    pub(super) fn error(
        &mut self,
        code: &'static str,
        span: &Range<usize>,
        key: &str,
        message: impl Into<String>,
        help: Option<String>,
    ) {
        let (line, column, excerpt) = self.lines.locate(span.start, span.len());
        self.problems.push(Problem {
            severity: Severity::Error,
            code,
            origin: Some(Origin { file: self.file.to_owned(), line, column }),
            key: key.to_owned(),
            message: message.into(),
            help,
            excerpt: Some(excerpt),
        });
    }
}

/// A table whose keys have been compared with the allowed ones.
pub(super) struct Fields<'t, 'i> {
    table: &'t DeTable<'i>,
    pub(super) span: Range<usize>,
    pub(super) path: String,
}

impl<'t, 'i> Fields<'t, 'i> {
    /// Reports each key that is not in `allowed`.
    pub(super) fn new(
        table: &'t DeTable<'i>,
        span: Range<usize>,
        path: String,
        allowed: &[&[&str]],
        sink: &mut Sink<'_>,
    ) -> Self {
        let fields = Self { table, span, path };
        for key in table.keys() {
            let name = key.get_ref().as_ref();
            if !allowed.iter().any(|group| group.contains(&name)) {
                let allowed: Vec<&str> = allowed.iter().flat_map(|group| group.iter().copied()).collect();
                let help = suggestion(name, &allowed);
                sink.error("unknown-key", &key.span(), &fields.key(name), "unknown key", Some(help));
            }
        }
        fields
    }

    /// Path of a key, as in `assign[0].match.id`.
    pub(super) fn key(&self, name: &str) -> String {
        let bare =
            name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')) && !name.is_empty();
        let name = if bare { name.to_owned() } else { format!("{name:?}") };
        if self.path.is_empty() { name } else { format!("{}.{name}", self.path) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.table.get(name).is_some()
    }

    pub(super) fn get(&self, name: &str) -> Option<Node<'t, 'i>> {
        let value = self.table.get(name)?;
        Some(Node { value, path: self.key(name) })
    }

    /// All entries, with the place of the key.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'t str, Range<usize>, Node<'t, 'i>)> + '_ {
        self.table.iter().map(|(key, value)| {
            let name = key.get_ref().as_ref();
            (name, key.span(), Node { value, path: self.key(name) })
        })
    }
}

/// One value.
#[derive(Clone)]
pub(super) struct Node<'t, 'i> {
    value: &'t Spanned<DeValue<'i>>,
    pub(super) path: String,
}

impl<'t, 'i> Node<'t, 'i> {
    pub(super) fn span(&self) -> Range<usize> {
        self.value.span()
    }

    pub(super) fn bad(&self, sink: &mut Sink<'_>, message: impl Into<String>, help: Option<String>) {
        sink.error("bad-value", &self.span(), &self.path, message, help);
    }

    fn wrong_type(&self, sink: &mut Sink<'_>, wanted: &str) {
        let found = match self.value.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a number",
            DeValue::Float(_) => "a number with a point",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        let message = format!("this is {found}, but must be {wanted}");
        sink.error("wrong-type", &self.span(), &self.path, message, None);
    }

    pub(super) fn as_str(&self) -> Option<&'t str> {
        self.value.get_ref().as_str()
    }

    pub(super) fn is_table(&self) -> bool {
        self.value.get_ref().is_table()
    }

    pub(super) fn text(&self, sink: &mut Sink<'_>) -> Option<&'t str> {
        let text = self.as_str();
        if text.is_none() {
            self.wrong_type(sink, "a string in quotes");
        }
        text
    }

    pub(super) fn boolean(&self, sink: &mut Sink<'_>) -> Option<bool> {
        let value = self.value.get_ref().as_bool();
        if value.is_none() {
            self.wrong_type(sink, "true or false");
        }
        value
    }

    pub(super) fn integer(&self, least: i64, most: i64, sink: &mut Sink<'_>) -> Option<i64> {
        let Some(number) = self.value.get_ref().as_integer() else {
            self.wrong_type(sink, "a number");
            return None;
        };
        let fits = i64::from_str_radix(number.as_str(), number.radix())
            .ok()
            .filter(|number| (least..=most).contains(number));
        if fits.is_none() {
            self.bad(sink, format!("{number} is out of range"), Some(format!("allowed: {least} to {most}")));
        }
        fits
    }

    pub(super) fn table(&self, allowed: &[&[&str]], sink: &mut Sink<'_>) -> Option<Fields<'t, 'i>> {
        let Some(table) = self.value.get_ref().as_table() else {
            self.wrong_type(sink, "a table");
            return None;
        };
        Some(Fields::new(table, self.span(), self.path.clone(), allowed, sink))
    }

    /// The same for a table whose keys are names that the operator chose.
    pub(super) fn names(&self, sink: &mut Sink<'_>) -> Option<Fields<'t, 'i>> {
        let Some(table) = self.value.get_ref().as_table() else {
            self.wrong_type(sink, &format!("tables [{}.NAME]", self.path));
            return None;
        };
        Some(Fields { table, span: self.span(), path: self.path.clone() })
    }

    /// The entries of a list. `wanted` names it for the message.
    pub(super) fn array(&self, wanted: &str, sink: &mut Sink<'_>) -> Vec<Node<'t, 'i>> {
        let Some(array) = self.value.get_ref().as_array() else {
            self.wrong_type(sink, wanted);
            return Vec::new();
        };
        let entry = |(index, value)| Node { value, path: format!("{}[{index}]", self.path) };
        array.iter().enumerate().map(entry).collect()
    }

    /// One value or a list of at least one.
    pub(super) fn one_or_more(&self, sink: &mut Sink<'_>) -> Vec<Node<'t, 'i>> {
        if !self.value.get_ref().is_array() {
            return vec![self.clone()];
        }
        let entries = self.array("a list", sink);
        if entries.is_empty() {
            self.bad(
                sink,
                "an empty list matches nothing",
                Some("leave the key out, or name something".into()),
            );
        }
        entries
    }

    /// One of some words.
    pub(super) fn word<T: Copy>(&self, words: &[(&str, T)], sink: &mut Sink<'_>) -> Option<T> {
        let Some(text) = self.as_str() else {
            let allowed: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
            self.wrong_type(sink, &format!("one of {}", allowed.join(", ")));
            return None;
        };
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let allowed: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.bad(sink, format!("{text:?} is not allowed here"), Some(suggestion(text, &allowed)));
        }
        found
    }

    /// A string that parses; the parser's message says what is allowed.
    pub(super) fn parsed<T: FromStr<Err: Display>>(&self, sink: &mut Sink<'_>) -> Option<T> {
        let text = self.text(sink)?;
        text.parse().map_err(|error: T::Err| self.bad(sink, error.to_string(), None)).ok()
    }

    /// A duration.
    pub(super) fn duration(&self, sink: &mut Sink<'_>) -> Option<Duration> {
        let text = self.text(sink)?;
        let parsed = parse_duration(text);
        if parsed.is_none() {
            let message = format!("{text:?} is not a duration");
            self.bad(sink, message, Some("a number and ms, s, min or h, up to 24h, like \"10s\"".into()));
        }
        parsed
    }

    /// `5/30s`.
    pub(super) fn flap(&self, sink: &mut Sink<'_>) -> Option<Flap> {
        let text = self.text(sink)?;
        let parsed = text.split_once('/').and_then(|(count, window)| {
            let count = digits(count)?;
            Some(Flap { count: u32::try_from(count).ok()?, window: parse_duration(window)? })
        });
        let parsed = parsed.filter(|flap| (1..=1000).contains(&flap.count) && !flap.window.is_zero());
        if parsed.is_none() {
            let message = format!("{text:?} is not a rate");
            self.bad(sink, message, Some("plug-ins (1 to 1000), '/', time, like \"5/30s\"".into()));
        }
        parsed
    }
}

fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// `500ms`, `10s`, `5min`, `2h`; at most a day.
fn parse_duration(text: &str) -> Option<Duration> {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let unit = text.find(|one: char| !one.is_ascii_digit())?;
    let (number, unit) = text.split_at(unit);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    let duration = Duration::from_millis(digits(number)?.checked_mul(millis)?);
    (duration <= DAY).then_some(duration)
}

/// `did you mean "x"? allowed: …`.
pub(super) fn suggestion(found: &str, allowed: &[&str]) -> String {
    let list = allowed.iter().map(|one| format!("{one:?}")).collect::<Vec<_>>().join(", ");
    match closest(found, allowed) {
        Some(best) => format!("did you mean {best:?}? allowed: {list}"),
        None if allowed.is_empty() => "nothing is allowed here".to_owned(),
        None => format!("allowed: {list}"),
    }
}

/// The one that was probably meant: a third of its characters wrong at most.
pub(super) fn closest<'w>(found: &str, allowed: &[&'w str]) -> Option<&'w str> {
    let last_part = |one: &&&str| one.rsplit_once('.').is_some_and(|(_, last)| last == found);
    if let Some(best) = allowed.iter().find(last_part) {
        return Some(best);
    }
    let scored = allowed.iter().map(|one| (edits(found, one), *one));
    let (distance, best) = scored.min()?;
    (distance <= best.chars().count().div_ceil(3)).then_some(best)
}

/// Insertions, deletions, changes and swaps of neighbours from one to the other.
fn edits(left: &str, right: &str) -> usize {
    const CHARS_MAX: usize = 64;
    let left: Vec<char> = left.chars().take(CHARS_MAX).collect();
    let right: Vec<char> = right.chars().take(CHARS_MAX).collect();
    let mut rows = vec![vec![0; right.len() + 1]; left.len() + 1];
    for row in 0..=left.len() {
        for column in 0..=right.len() {
            rows[row][column] = if row == 0 || column == 0 {
                row + column
            } else {
                let same = left[row - 1] == right[column - 1];
                let mut best = (rows[row - 1][column] + 1)
                    .min(rows[row][column - 1] + 1)
                    .min(rows[row - 1][column - 1] + usize::from(!same));
                if row > 1
                    && column > 1
                    && left[row - 1] == right[column - 2]
                    && left[row - 2] == right[column - 1]
                {
                    best = best.min(rows[row - 2][column - 2] + 1);
                }
                best
            };
        }
    }
    rows[left.len()][right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closest_finds_swaps_and_lost_letters_but_invents_nothing() {
        let keys = ["match", "mode", "vm", "vms", "name"];
        assert_eq!(closest("mathc", &keys), Some("match"));
        assert_eq!(closest("nam", &keys), Some("name"));
        assert_eq!(closest("colour", &keys), None);
    }

    #[test]
    fn durations_have_a_unit_and_an_end() {
        assert_eq!(parse_duration("10s"), Some(Duration::from_secs(10)));
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        for text in ["", "10", "s", "-1s", "1.5s", "10 s", "25h", "99999999999999999999h"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
