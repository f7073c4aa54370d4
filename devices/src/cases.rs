//! How many cases of a property are tried.

use proptest::prelude::ProptestConfig;

/// `usual` cases of a property, or as many as the environment asks for in a long run.
pub(crate) fn cases(usual: u32) -> ProptestConfig {
    let asked = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_some() {
        return asked;
    }
    ProptestConfig {
        cases: usual,
        ..asked
    }
}
