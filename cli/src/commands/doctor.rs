use crate::admin::Context;
use crate::error::Error;
pub(crate) async fn run(_context: &mut Context) -> Result<(), Error> {
    Ok(())
}
