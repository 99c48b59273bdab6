//! What a kernel's code depends on.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// The file and everything under `root` that it includes, however deep, by path. Headers that `root` does not hold are
/// the toolkit's, which the compiler's version stands for.
pub fn closure(root: &Path, file: &Path) -> Result<BTreeMap<PathBuf, String>, String> {
    let mut texts = BTreeMap::new();
    let mut open = vec![normal(&root.join(file))];
    while let Some(path) = open.pop() {
        if texts.contains_key(&path) {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{} can't be read: {e}", path.display()))?;
        for name in text.lines().filter_map(included) {
            let beside = path.parent().unwrap_or(root).join(name);
            open.extend([beside, root.join(name)].iter().map(|p| normal(p)).find(|p| p.is_file()));
        }
        texts.insert(path, text);
    }
    Ok(texts)
}

/// `x` from `#include "x"` or `#include <x>`.
fn included(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?.trim_start();
    let close = if rest.starts_with('"') { '"' } else { '>' };
    rest.get(1..)?.split_once(close).map(|r| r.0)
}

/// Without `.` and `..`, so that one file has one path.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}
