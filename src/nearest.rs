//! Suggestions for a name that is probably mistyped: of a variable, or of a
//! directory.

use std::path::{Component, Path, PathBuf};

/// Similarity above which a name is taken for a mistyped one: two of five
/// letters may be wrong, and not three. 1 is the name itself.
const SIMILARITY_MIN: f64 = 0.6;
/// Most entries of a directory that are compared with a name: a directory of
/// models has a few, and one of pictures may have millions.
const ENTRIES_MAX: usize = 10_000;
/// Most directories that are listed for one path: a name of it that is mistyped
/// takes one, or as many as there are names that are like it.
const LISTINGS_MAX: u32 = 32;

/// Returns the known name that is most like `name`, if one is like it; of equals
/// the first in the alphabet.
pub(crate) fn nearest_name<T: AsRef<str>>(
    name: &str,
    known: impl IntoIterator<Item = T>,
) -> Option<T> {
    similar_names(name, known).into_iter().next()
}

/// Returns the known names that are like `name`, the most similar first.
fn similar_names<T: AsRef<str>>(name: &str, known: impl IntoIterator<Item = T>) -> Vec<T> {
    let similarity = |known: T| {
        let similarity = strsim::normalized_damerau_levenshtein(name, known.as_ref());
        (similarity >= SIMILARITY_MIN).then_some((similarity, known))
    };
    let mut similar: Vec<(f64, T)> = known.into_iter().filter_map(similarity).collect();
    similar.sort_by(|(a, one), (b, other)| {
        b.total_cmp(a)
            .then_with(|| one.as_ref().cmp(other.as_ref()))
    });
    similar.into_iter().map(|(_, name)| name).collect()
}

/// Returns the directory that exists and is most like `path`, name by name; none
/// if a name of the path is like none that is there.
pub(crate) fn nearest_directory(path: &Path) -> Option<PathBuf> {
    let parts: Vec<Component<'_>> = path.components().collect();
    below(PathBuf::new(), &parts, &mut { LISTINGS_MAX })
}

/// Returns the directory below `found` that is most like the rest of a path.
/// Lists at most `n_left` directories.
fn below(found: PathBuf, rest: &[Component<'_>], n_left: &mut u32) -> Option<PathBuf> {
    let Some((first, rest)) = rest.split_first() else {
        return Some(found);
    };
    let next = found.join(first);
    if next.is_dir() {
        return below(next, rest, n_left);
    }
    *n_left = n_left.checked_sub(1)?;
    let is_here = found.as_os_str().is_empty();
    let within = if is_here { Path::new(".") } else { &found };
    let names = std::fs::read_dir(within)
        .ok()?
        .take(ENTRIES_MAX)
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok());
    let similar = similar_names(first.as_os_str().to_str()?, names);
    let mut similar = similar.iter();
    similar.find_map(|name| below(found.join(name), rest, n_left))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_a_few_wrong_letters_are_found() {
        let known = ["MAX_BATCH_SIZE", "BATCH_SIZES", "LISTEN", "METRICS_LISTEN"];
        let check = |name: &str, expected: Option<&str>| {
            assert_eq!(nearest_name(name, known), expected, "{name}");
        };
        check("MAX_BATCHSIZE", Some("MAX_BATCH_SIZE"));
        check("BATCH_SIZE", Some("BATCH_SIZES"));
        check("LISTNE", Some("LISTEN"));
        check("METRIC_LISTEN", Some("METRICS_LISTEN"));
        check("LISTEN", Some("LISTEN"));
        check("PICTURES", None);
        check("", None);
        assert_eq!(nearest_name("ab", ["ac", "ad"]), None);
        assert_eq!(nearest_name("abcd", ["abce", "abcc"]), Some("abcc"));
    }

    #[test]
    fn directories_are_found_name_by_name() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["models/emoji", "models/untrained", "modules"] {
            std::fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("models/emojy"), "a file").unwrap();
        let check = |path: &str, expected: Option<&str>| {
            let found = nearest_directory(&folder.path().join(path));
            assert_eq!(
                found,
                expected.map(|path| folder.path().join(path)),
                "{path}"
            );
        };
        check("models/emojy", Some("models/emoji"));
        // More like `modules`, which has no emoji.
        check("modles/emoji", Some("models/emoji"));
        check("modles/untraind", Some("models/untrained"));
        check("models/emoji", Some("models/emoji"));
        check("models/flags", None);
        check("elsewhere/emoji", None);
        // This package has a directory `models`.
        let near = nearest_directory(Path::new("./modles/emojy"));
        assert_eq!(near.as_deref(), Some(Path::new("./models/emoji")));
        let near = nearest_directory(Path::new("modles"));
        assert_eq!(near.as_deref(), Some(Path::new("models")));
    }
}
