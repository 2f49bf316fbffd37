-- ARGV: key of the set of ids whose bodies were moved to one folder, ids of the files that are there. Result for each:
-- 0 it is needed, 1 this ledger moved it and lists it no more, 2 this ledger does not know it. Absence alone proves
-- nothing: a Redis that came back empty or older knows none of the files.
local names, whole = destinations()
local found = {}
for n = 2, #ARGV do
  local id = ARGV[n]
  if redis.call('EXISTS', 'smtpdup:message:' .. id) == 1 then
    redis.call('SADD', ARGV[1], id)
    found[#found + 1] = 0
  elseif not whole or is_listed(names, id) then
    found[#found + 1] = 0
  else
    found[#found + 1] = redis.call('SISMEMBER', ARGV[1], id) == 1 and 1 or 2
  end
end
return found
