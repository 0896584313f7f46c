//! `docs/xhci-coverage.md` names only tests that exist.

use std::path::Path;

fn sources(directory: &Path, text: &mut String) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else {
            text.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn each_test_named_in_the_coverage_page_exists() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(package.join("../docs/xhci-coverage.md")).unwrap();
    let mut code = String::new();
    for directory in ["src", "../vm-tests/tests"] {
        sources(&package.join(directory), &mut code);
    }
    let is_test_name =
        |name: &&str| name.split('_').count() > 3 && name.bytes().all(|b| !b.is_ascii_uppercase());
    let named: Vec<&str> = page.split('`').skip(1).step_by(2).filter(is_test_name).collect();
    assert!(named.len() > 80, "the page names its tests");
    let missing: Vec<_> = named.iter().filter(|name| !code.contains(&format!("fn {name}("))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
