//! Which modules a quantisation config leaves alone: plain names, globs (`*`) and the regular expressions that
//! compressed-tensors marks with `re:`.
//!
//! Names and globs match whole path segments anywhere in a module's name, so that `gate` (AWQ) means the router
//! `mlp.gate` and not `gate_proj`. Regular expressions match from the beginning, as Python's `re.match` does. Only their
//! common part is understood; anything else is an error instead of a guess.

use super::CheckpointError;

/// One entry of an ignore list, or one target.
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    /// A name or a glob.
    Name(Vec<Item>),
    /// The alternatives of a regular expression, groups multiplied out.
    Regex(Vec<Vec<Item>>),
}

/// A character test with its repetition.
#[derive(Clone, Debug)]
pub(super) struct Item {
    test: Test,
    optional: bool,
    repeated: bool,
}

#[derive(Clone, Debug)]
enum Test {
    Any,
    One(char),
    Class { negated: bool, ranges: Vec<(char, char)> },
    End,
}

impl Test {
    fn matches(&self, c: char) -> bool {
        match self {
            Test::Any => true,
            Test::One(x) => *x == c,
            Test::Class { negated, ranges } => ranges.iter().any(|&(a, b)| (a..=b).contains(&c)) != *negated,
            Test::End => false,
        }
    }
}

impl Pattern {
    /// An entry as the configs spell it.
    pub fn new(text: &str) -> Result<Self, CheckpointError> {
        match text.strip_prefix("re:") {
            // "mlp.gate." is how some spell that they mean the whole segment, which is meant anyway.
            None => Ok(Pattern::Name(text.trim_matches('.').chars().map(glob_item).collect())),
            Some(regex) => Self::regex(regex),
        }
    }

    /// A regular expression without the `re:`.
    pub fn regex(text: &str) -> Result<Self, CheckpointError> {
        let unsupported = || CheckpointError::Unsupported(format!("regular expression {text:?} in a list of modules"));
        let alternatives = expand(text).ok_or_else(unsupported)?;
        let parsed: Option<Vec<_>> = alternatives.iter().map(|a| items(a)).collect();
        Ok(Pattern::Regex(parsed.ok_or_else(unsupported)?))
    }

    /// Whether it means this module, given by its full name.
    pub fn matches(&self, module: &str) -> bool {
        match self {
            Pattern::Name(name) => {
                let mut starts = std::iter::once(0).chain(module.match_indices('.').map(|(i, _)| i + 1));
                !name.is_empty() && starts.any(|s| run(name, &module[s..], true))
            }
            Pattern::Regex(alternatives) => alternatives.iter().any(|a| run(a, module, false)),
        }
    }
}

fn glob_item(c: char) -> Item {
    let star = c == '*';
    Item { test: if star { Test::Any } else { Test::One(c) }, optional: star, repeated: star }
}

/// Whether the items match a beginning of `text`; with `segments` one that ends where a path segment ends. Keeps the
/// set of all places that the text so far leads to, so that no pattern takes more than length times length steps.
fn run(items: &[Item], text: &str, segments: bool) -> bool {
    let mut live = vec![false; items.len() + 1];
    live[0] = true;
    let mut chars = text.chars();
    loop {
        let next = chars.next();
        for (i, item) in items.iter().enumerate() {
            let passes = item.optional || (matches!(item.test, Test::End) && next.is_none());
            if live[i] && passes {
                live[i + 1] = true;
            }
        }
        if live[items.len()] && (!segments || matches!(next, None | Some('.'))) {
            return true;
        }
        let Some(c) = next else { return false };
        let mut after = vec![false; items.len() + 1];
        for (i, item) in items.iter().enumerate() {
            if live[i] && item.test.matches(c) {
                after[i + 1] = true;
                // A repeated item is always optional too (`+` is parsed as one item and a starred copy).
                after[i] |= item.repeated;
            }
        }
        live = after;
    }
}

/// Multiplies out groups: `a(b|c)d` gives `abd` and `acd`. `None`: something that is not understood.
fn expand(text: &str) -> Option<Vec<String>> {
    let mut done = vec![String::new()];
    let mut rest = text;
    while let Some(at) = find_unescaped(rest, &['(', ')', '|']) {
        if !rest[at..].starts_with('(') {
            // An alternation outside of any group is rare and would bind differently.
            return None;
        }
        let end = at + 1 + find_unescaped(&rest[at + 1..], &[')'])?;
        let inner = rest[at + 1..end].strip_prefix("?:").unwrap_or(&rest[at + 1..end]);
        let after = &rest[end + 1..];
        if inner.starts_with('?') || find_unescaped(inner, &['(']).is_some() || after.starts_with(['*', '+', '?', '{'])
        {
            return None;
        }
        let options: Vec<&str> = inner.split('|').collect();
        if done.len().checked_mul(options.len())? > 1024 {
            return None;
        }
        let head = &rest[..at];
        done = done.iter().flat_map(|d| options.iter().map(move |o| format!("{d}{head}{o}"))).collect();
        rest = after;
    }
    done.iter_mut().for_each(|d| d.push_str(rest));
    Some(done)
}

fn find_unescaped(text: &str, wanted: &[char]) -> Option<usize> {
    let mut escaped = false;
    text.char_indices()
        .find(|&(_, c)| {
            let hit = !escaped && wanted.contains(&c);
            escaped = !escaped && c == '\\';
            hit
        })
        .map(|(i, _)| i)
}

/// Parses an expression without groups.
fn items(text: &str) -> Option<Vec<Item>> {
    let mut out: Vec<Item> = Vec::new();
    let mut chars = text.strip_prefix('^').unwrap_or(text).chars().peekable();
    while let Some(c) = chars.next() {
        let test = match c {
            '.' => Test::Any,
            '$' => Test::End,
            '[' => class(&mut chars)?,
            '\\' => match chars.next()? {
                'd' => Test::Class { negated: false, ranges: vec![('0', '9')] },
                'w' => Test::Class { negated: false, ranges: vec![('0', '9'), ('a', 'z'), ('A', 'Z'), ('_', '_')] },
                e if e.is_alphanumeric() => return None,
                e => Test::One(e),
            },
            '*' | '+' | '?' | '{' | '}' | '^' | ']' => return None,
            c => Test::One(c),
        };
        let quantifier = chars.next_if(|c| matches!(c, '*' | '+' | '?'));
        // Greedy or not makes no difference to whether it matches.
        if quantifier.is_some() {
            chars.next_if_eq(&'?');
        }
        if quantifier == Some('+') {
            out.push(Item { test: test.clone(), optional: false, repeated: false });
        }
        let repeated = matches!(quantifier, Some('*' | '+'));
        out.push(Item { test, optional: quantifier.is_some(), repeated });
    }
    Some(out)
}

fn class(chars: &mut std::iter::Peekable<std::str::Chars>) -> Option<Test> {
    let negated = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    loop {
        let from = match chars.next()? {
            ']' => return Some(Test::Class { negated, ranges }),
            '\\' => chars.next().filter(|e| !e.is_alphanumeric())?,
            c => c,
        };
        let mut to = from;
        if chars.next_if_eq(&'-').is_some() {
            to = chars.next().filter(|&c| c != ']' && c != '\\')?;
        }
        ranges.push((from, to));
    }
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    #[test]
    fn names_globs_and_regular_expressions() {
        let up = "model.layers.10.mlp.experts.3.up_proj";
        for (pattern, matches) in [
            ("model.layers.10.mlp.experts.3.up_proj", true),
            ("model.layers.10.mlp", true),
            ("model.layers.1", false),
            ("experts", true),
            ("up", false),
            ("gate", false),
            ("mlp.experts.", true),
            ("model.layers.*.mlp", true),
            ("model.layers.*.self_attn", false),
            ("*experts*", true),
            ("*", true),
            ("", false),
            ("re:.*up_proj$", true),
            ("re:.*up$", false),
            ("re:up_proj", false),
            ("re:model\\.layers\\.\\d+\\.mlp.*", true),
            ("re:.*layers\\.(1|10)\\..*(?:up|down)_proj", true),
            ("re:^model.layers.[0-9]+.self_attn", false),
        ] {
            assert_eq!(Pattern::new(pattern).unwrap().matches(up), matches, "{pattern}");
        }
        for pattern in ["re:(?!x)y", "re:a|b", "re:a{3}", "re:(a", "re:[a", "re:\\", "re:*"] {
            Pattern::new(pattern).unwrap_err();
        }
    }
}
