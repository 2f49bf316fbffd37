-- Put in front of the scripts that make a message due: its recipients are noted on the uncertain ones with its digest.
-- Returns whether there is one. cjson cannot read lone surrogates (addresses that are no UTF-8), so the lists are kept as
-- text, one a line.
local function cover_twins(digest, recipients)
  local is_covering = false
  for twin in string.gmatch(redis.call('HGET', 'smtpdup:twins', digest) or '', '%S+') do
    if redis.call('ZSCORE', 'smtpdup:uncertain', twin) then
      local before = redis.call('HGET', 'smtpdup:covered', twin)
      redis.call('HSET', 'smtpdup:covered', twin, before and (before .. '\n' .. recipients) or recipients)
      is_covering = true
    end
  end
  return is_covering
end
