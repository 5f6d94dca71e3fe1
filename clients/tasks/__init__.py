"""The tasks that come with fedcore; `fedcore list tasks` names them."""
