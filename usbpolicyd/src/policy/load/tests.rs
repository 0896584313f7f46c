use super::*;

fn source(layer: Layer, path: &str, text: &str) -> Source {
    Source { layer, path: path.to_owned(), text: text.to_owned() }
}

fn assign(name: &str, vm: &str) -> String {
    format!("[[assign]]\nname = '{name}'\nvm = '{vm}'\nmatch.id = '0781:5581'\n")
}

const HEAD: &str = "schema = 1\n[vms.a]\n[vms.b]\n";

/// VMs of the rules, by name of the rule.
fn rules(sources: &[Source]) -> Vec<(String, String)> {
    let rules = load(sources).unwrap().policy.assign.into_iter();
    let mut rules: Vec<_> = rules.map(|rule| (rule.name.unwrap(), rule.vms[0].to_string())).collect();
    rules.sort();
    rules
}

fn pair(name: &str, vm: &str) -> (String, String) {
    (name.to_owned(), vm.to_owned())
}

#[test]
fn no_file_at_all_is_a_policy_that_assigns_nothing() {
    assert_eq!(load(&[]).unwrap().policy, Policy::default());
}

#[test]
fn rules_of_all_files_come_together() {
    let sources = [
        source(Layer::Vendor, "/usr/lib/x/10.toml", &format!("schema = 1\n{}", assign("one", "a"))),
        source(Layer::Main, "/etc/x/policy.toml", &format!("{HEAD}{}", assign("two", "b"))),
    ];
    assert_eq!(rules(&sources), [pair("one", "a"), pair("two", "b")]);
}

#[test]
fn named_rule_of_a_later_file_replaces_the_earlier_and_says_so() {
    let sources = [
        source(Layer::Local, "/etc/x/policy.d/10.toml", &format!("schema = 1\n{}", assign("one", "b"))),
        source(Layer::Main, "/etc/x/policy.toml", &format!("{HEAD}{}", assign("one", "a"))),
    ];
    assert_eq!(rules(&sources), [pair("one", "b")]);
    let notes = load(&sources).unwrap().notes;
    let told: Vec<String> = notes.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        ["/etc/x/policy.d/10.toml:2:1: note: rule \"one\" replaces the one at /etc/x/policy.toml:4:1"]
    );
}

#[test]
fn table_of_a_later_file_replaces_the_whole_earlier_one() {
    let sources = [
        source(Layer::Main, "policy.toml", "schema = 1\n[vms.a]\ntrust = 9\nmax_devices = 3\n"),
        source(Layer::Local, "10.toml", "schema = 1\n[vms.a]\nmax_devices = 5\n"),
    ];
    let policy = load(&sources).unwrap().policy;
    let vm = policy.vms.values().next().unwrap();
    assert_eq!((vm.trust, vm.limits.max_devices), (0, Some(5)));
}

#[test]
fn drop_ins_of_a_directory_go_by_name_not_by_the_order_they_were_found() {
    let later = source(Layer::Local, "/etc/x/20.toml", &format!("schema = 1\n{}", assign("one", "b")));
    let earlier = source(Layer::Local, "/etc/x/10.toml", &format!("{HEAD}{}", assign("one", "a")));
    assert_eq!(rules(&[later, earlier]), [pair("one", "b")]);
}

#[test]
fn empty_file_masks_the_vendors_file_of_that_name() {
    let vendor = source(Layer::Vendor, "/usr/lib/x/10-vendor.toml", "this is no policy");
    let mask = source(Layer::Local, "/etc/x/10-vendor.toml", "# masked\n");
    let loaded = load(&[vendor.clone(), mask]).unwrap();
    assert_eq!(loaded.notes[0].code, "masked");
    assert!(load(&[vendor]).is_err());
}

#[test]
fn mistakes_of_all_files_are_told_at_once() {
    let sources = [
        source(Layer::Main, "a.toml", "schema = 1\ncolour = 'red'\n"),
        source(Layer::Local, "b.toml", "schema = 1\nform = 'round'\n"),
    ];
    let problems = load(&sources).unwrap_err();
    let files: Vec<&str> = problems.iter().map(|one| one.origin.as_ref().unwrap().file.as_str()).collect();
    assert_eq!(files, ["a.toml", "b.toml"]);
}

#[test]
fn endless_file_is_refused_unread() {
    let problems = load(&[source(Layer::Main, "a.toml", &"#".repeat(FILE_MAX + 1))]).unwrap_err();
    assert_eq!(problems[0].code, "too-large");
}

#[test]
fn deeply_nested_text_does_not_exhaust_the_stack() {
    let text = format!("schema = 1\nx = {}", "[".repeat(100_000));
    assert!(load_one("a.toml", &text).is_err());
}
