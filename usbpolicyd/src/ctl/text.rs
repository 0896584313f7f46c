//! Text for terminals: strings of devices made harmless, lines kept to 80 columns, colour only where it is wanted.

use std::fmt::Write as _;
use std::io::IsTerminal as _;

use crate::policy::problem::{Problem, Severity};

/// Columns we write for.
pub(super) const WIDTH: usize = 80;

/// Whether to use colour: standard output is a terminal and `NO_COLOR` is not set.
pub(super) fn colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Makes a string of a device harmless: what a terminal would act on, what turns the direction of writing and what
/// cannot be seen is written as `\u{…}`; quotes are the caller's business.
pub(crate) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for one in text.chars() {
        if is_harmless(one) {
            safe.push(one);
        } else {
            let _ = write!(safe, "\\u{{{:x}}}", u32::from(one));
        }
    }
    safe
}

fn is_harmless(one: char) -> bool {
    let unseen = matches!(one,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
        | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e0fff}');
    !one.is_control() && !unseen && one != '\\'
}

/// Breaks text into lines of at most `width` columns, at spaces where there are some.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let pieces: Vec<String> = text.split_whitespace().flat_map(|word| chopped(word, width)).collect();
    for word in &pieces {
        let Some(line) = lines.last_mut() else { continue };
        let used = line.chars().count();
        if used == 0 {
            line.push_str(word);
        } else if used + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.clone());
        }
    }
    lines
}

/// A word in parts of at most `width` characters.
fn chopped(word: &str, width: usize) -> Vec<String> {
    let chars: Vec<char> = word.chars().collect();
    chars.chunks(width.max(1)).map(|part| part.iter().collect()).collect()
}

/// A problem with its line of the file, the way compilers show it.
pub(super) fn problem(problem: &Problem, colour: bool) -> String {
    let (on, off) = match (colour, problem.severity) {
        (false, _) => ("", ""),
        (true, Severity::Error) => ("\x1b[1;31m", "\x1b[0m"),
        (true, Severity::Warning) => ("\x1b[1;33m", "\x1b[0m"),
        (true, Severity::Note) => ("\x1b[1;36m", "\x1b[0m"),
    };
    let mut text = String::new();
    if let Some(origin) = &problem.origin {
        let _ = writeln!(text, "{}:", escaped(&origin.to_string()));
    }
    let key = if problem.key.is_empty() { String::new() } else { format!("{}: ", problem.key) };
    let head = format!("{}: {}{}", problem.severity, key, escaped(&problem.message));
    for (index, line) in wrapped(&head, WIDTH - 2).iter().enumerate() {
        let line = match line.strip_prefix(&problem.severity.to_string()) {
            Some(rest) if index == 0 => format!("{on}{}{off}{rest}", problem.severity),
            _ => line.clone(),
        };
        let _ = writeln!(text, "  {line}");
    }
    if let (Some(origin), Some(excerpt)) = (&problem.origin, &problem.excerpt) {
        text.push_str(&quoted(origin.line, origin.column, &excerpt.line, excerpt.width));
    }
    if let Some(help) = &problem.help {
        for (index, line) in wrapped(&escaped(help), WIDTH - 8).iter().enumerate() {
            let _ = writeln!(text, "  {} {line}", if index == 0 { "help:" } else { "     " });
        }
    }
    text
}

/// The line, or the part of it around what is meant, with carets below.
fn quoted(line: u32, column: u32, whole: &str, width: usize) -> String {
    let number = line.to_string();
    let room = WIDTH.saturating_sub(number.len() + 5);
    let mut before = usize::try_from(column.saturating_sub(1)).unwrap_or(0);
    let hidden = if before + width.min(room / 2) > room { before - room / 2 } else { 0 };
    before -= hidden;
    let printable = |one: char| if is_harmless(one) || one == '\\' { one } else { ' ' };
    let shown: String = whole.chars().skip(hidden).take(room).map(printable).collect();
    let carets = "^".repeat(width.min(room.saturating_sub(before)).max(1));
    let gutter = " ".repeat(number.len());
    format!("  {number} | {}\n  {gutter} | {:before$}{carets}\n", shown.trim_end(), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_acts_on_is_escaped() {
        assert_eq!(escaped("a\x1b[31mb"), r"a\u{1b}[31mb");
        assert_eq!(escaped("a\u{202e}b\u{200b}"), r"a\u{202e}b\u{200b}");
        assert_eq!(escaped("line\nbreak"), r"line\u{a}break");
        assert_eq!(escaped("Müller 日本"), "Müller 日本");
    }

    #[test]
    fn escaping_cannot_be_faked() {
        assert_ne!(escaped(r"\u{1b}"), escaped("\x1b"));
    }

    #[test]
    fn long_text_is_broken_at_spaces_and_long_words_anywhere() {
        assert_eq!(wrapped("aa bb cc", 5), ["aa bb", "cc"]);
        assert_eq!(wrapped("aaaabbbbcc", 4), ["aaaa", "bbbb", "cc"]);
        assert_eq!(wrapped("", 5), [""]);
    }
}
