//! The reference part of a man page, in mdoc(7), from a program's command line: a heading for each verb, with its
//! description and options.

use std::fmt::Write as _;

use clap::{Arg, Command};

/// The line of a page that the reference takes the place of.
pub const MARK: &str = ".\\\" REFERENCE";

/// All verbs of a program, each with its options. `help` is left out.
pub fn reference(program: &Command) -> String {
    let mut text = String::new();
    for verb in program.get_subcommands().filter(|verb| is_shown(verb)) {
        describe(verb, verb.get_name(), &mut text);
    }
    text
}

fn is_shown(verb: &Command) -> bool {
    !verb.is_hide_set() && verb.get_name() != "help"
}

fn describe(verb: &Command, path: &str, text: &mut String) {
    let positional: Vec<String> = verb.get_positionals().map(placeholder).collect();
    let _ = writeln!(text, ".Ss {}", [&[path.to_owned()], positional.as_slice()].concat().join(" "));
    if let Some(about) = verb.get_long_about().or(verb.get_about()) {
        paragraphs(&about.to_string(), text);
    }
    let options: Vec<&Arg> = verb.get_arguments().filter(|option| is_listed(option)).collect();
    if !options.is_empty() {
        text.push_str(".Bl -tag -width Ds\n");
        for option in options {
            item(option, text);
        }
        text.push_str(".El\n");
    }
    for below in verb.get_subcommands().filter(|verb| is_shown(verb)) {
        describe(below, &format!("{path} {}", below.get_name()), text);
    }
}

fn is_listed(option: &Arg) -> bool {
    !option.is_hide_set() && option.get_id() != "help" && option.get_id() != "version"
}

/// `DEVICE`, `[FILE ...]`.
fn placeholder(option: &Arg) -> String {
    let many = option.get_num_args().is_some_and(|range| range.max_values() > 1);
    let name = format!("{}{}", value_name(option), if many { " ..." } else { "" });
    if option.is_required_set() { name } else { format!("[{name}]") }
}

fn value_name(option: &Arg) -> String {
    let names = option.get_value_names().unwrap_or_default();
    let name = names.first().map_or_else(|| option.get_id().to_string(), ToString::to_string);
    name.to_uppercase()
}

fn item(option: &Arg, text: &mut String) {
    text.push_str(".It");
    let mut separator = "";
    if let Some(short) = option.get_short() {
        let _ = write!(text, " Fl {short}");
        separator = " ,";
    }
    if let Some(long) = option.get_long() {
        let _ = write!(text, "{separator} Fl -{long}");
    }
    let is_positional = option.is_positional();
    if is_positional || option.get_action().takes_values() {
        let _ = write!(text, " Ar {}", value_name(option));
    }
    text.push('\n');
    if let Some(help) = option.get_long_help().or(option.get_help()) {
        paragraphs(&help.to_string(), text);
    }
    let values: Vec<String> =
        option.get_possible_values().iter().map(|it| it.get_name().to_owned()).collect();
    if option.get_action().takes_values() && !values.is_empty() {
        paragraphs(&format!("One of: {}.", values.join(", ")), text);
    }
    let defaults: Vec<String> =
        option.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
    if option.get_action().takes_values() && !defaults.is_empty() {
        paragraphs(&format!("By default {}.", defaults.join(" ")), text);
    }
}

/// Text as mdoc: a sentence ends where a line ends, an empty line begins a paragraph, nothing is a macro.
fn paragraphs(plain: &str, text: &mut String) {
    for line in plain.lines() {
        if line.trim().is_empty() {
            text.push_str(".Pp\n");
            continue;
        }
        let mut line = line.trim_start().replace('\\', "\\e");
        if line.starts_with(['.', '\'']) {
            line.insert_str(0, "\\&");
        }
        text.push_str(&line.replace(". ", ".\n"));
        if !line.ends_with(['.', ':', ',']) {
            text.push('.');
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verb_of_a_verb_and_its_options_are_described() {
        let pause = Command::new("pause")
            .about("Give it nothing. New\n.things too")
            .arg(Arg::new("vm").required(true))
            .arg(Arg::new("for").long("for").short('f').value_name("TIME").help("How long, in \\s"));
        let program = Command::new("p").subcommand(Command::new("vm").subcommand(pause));
        let text = reference(&program);
        assert!(text.contains(".Ss vm pause VM\nGive it nothing.\nNew.\n\\&.things too.\n"), "{text}");
        assert!(text.contains(".It Fl f , Fl -for Ar TIME\nHow long, in \\es.\n"), "{text}");
    }

    #[test]
    fn hidden_verbs_and_help_are_left_out() {
        let program = Command::new("p").subcommand(Command::new("secret").hide(true));
        assert_eq!(reference(&program), "");
    }
}
