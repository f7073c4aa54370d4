//! Pages that the guest does not use: what they hold need not be sent.

use std::time::Duration;

use super::crew::Crew;
use super::{MigrateError, SourceJob};
use crate::page_set::PageSet;

/// The guest is listened to for so long at most: some fill with zeroes what they tell. Most have told all much sooner.
const MAX_REPORT_TIME: Duration = Duration::from_secs(2);
/// and for no more than this part of the time that is left.
const DEADLINE_SHARE: u32 = 20;

impl SourceJob<'_> {
    /// Takes out of `populated`, which the first round is to send, what the guest says that it does not use, and
    /// returns those pages. They count as zero until they are written.
    ///
    /// All marks are cleared before the guest is asked. So a page that it tells and that is not marked afterwards was
    /// not written since it was of no use; one that is written later is marked, and is sent then.
    pub(super) fn exclude_unused(
        &mut self,
        crew: &Crew<'_>,
        populated: &mut PageSet,
    ) -> Result<PageSet, MigrateError> {
        let mut unused = PageSet::of(crew.space.memory)?;
        let left = self
            .options
            .deadline
            .map(|deadline| deadline.saturating_sub(self.started.elapsed()));
        let at_most = left.map_or(MAX_REPORT_TIME, |left| MAX_REPORT_TIME.min(left / DEADLINE_SHARE));
        let pages = populated.len();
        if !self.call("has_unused", |source| source.has_unused(pages, at_most))? {
            return Ok(unused);
        }
        crew.space.clear_all(populated)?;
        self.call("unused", |source| source.unused(at_most, &mut unused))?;
        let mut marked = PageSet::of(crew.space.memory)?;
        crew.space.peek_ram(&mut marked)?;
        unused.subtract(&marked);
        populated.subtract(&unused);
        self.report.pages_unused = pages - populated.len();
        tracing::debug!(pages = self.report.pages_unused, "unused by the guest");
        Ok(unused)
    }
}
